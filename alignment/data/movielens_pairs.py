"""Pairs out of MovieLens: of somebody who liked these films, the next one liked against one that was not.

What is rejected is a film drawn from all, one drawn in proportion to how often films were liked, or one that the same
person disliked. Everything is told by the training ratings alone: a later one neither is in a pair nor keeps a film
out of one, since a model could learn from what is never rejected.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from alignment.data.files import Row
from alignment.data.movielens import (
    DISLIKED,
    LEAST_SHOWN,
    LIKED,
    SHOWN,
    MovieLens,
    Rating,
    liked_before,
    movielens,
    prompt_of,
)
from alignment.data.split import digest

SEED = 0
SHARE_DISLIKED = 0.25
"""Of the pairs of somebody who disliked a film; of the rest one half is drawn from all films, one by popularity."""


def next_title_rows() -> Iterator[Row]:
    """Rows with `prompt`, `chosen`, `rejected` and `group` (the person), and `user`, `item`, `kind` of what is
    rejected (uniform, popular, disliked). They come in the order of a hash, so that any first ones are a sample."""
    yield from _by_hash(pair_rows(movielens(), seed=SEED))


def early_next_title_rows() -> Iterator[Row]:
    """The same rows without the last 10,000 ratings of the training part: for a policy that then learns from what the
    people of these choose, see `alignment.data.movielens_live`."""
    yield from _by_hash(pair_rows(movielens().without_test(), seed=SEED))


def _by_hash(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: digest(f"{row.values['user']}:{row.values['item']}"))


def pair_rows(data: MovieLens, *, seed: int) -> Iterator[Row]:
    """One row for each liked film of the training part before which at least `LEAST_SHOWN` were liked.

    A film that the person rated in training, before or after, is never drawn.
    """
    films = sorted(data.titles)
    popularity = data.train_likes()
    for user, ratings in sorted(data.rated("train").items()):
        rated = {rating.item for rating in ratings}
        unrated = [film for film in films if film not in rated]
        pool = _Pool(
            disliked=[rating.item for rating in ratings if rating.stars <= DISLIKED],
            unrated=unrated,
            totals=list(accumulate(popularity[film] for film in unrated)),
        )
        for target in (rating for rating in ratings if rating.stars >= LIKED):
            shown = liked_before(ratings, target.time)[-SHOWN:]
            if len(shown) >= LEAST_SHOWN and pool.kinds:
                draw = random.Random(f"{seed}:{user}:{target.item}")
                yield _row(data, target, shown, *pool.rejected(draw))


@dataclass(frozen=True, slots=True)
class _Pool:
    """What may be rejected for one person."""

    disliked: list[int]
    unrated: list[int]
    totals: list[int]
    """Running sums of the popularity of `unrated`."""

    @property
    def kinds(self) -> list[str]:
        liked_by_others = bool(self.unrated) and self.totals[-1] > 0
        return ["uniform"] * bool(self.unrated) + ["popular"] * liked_by_others

    def rejected(self, draw: random.Random) -> tuple[int, str]:
        """A film, and how it was drawn."""
        if draw.random() < SHARE_DISLIKED and self.disliked:
            return draw.choice(self.disliked), "disliked"
        kind = draw.choice(self.kinds)
        if kind == "uniform":
            return draw.choice(self.unrated), kind
        return draw.choices(self.unrated, cum_weights=self.totals)[0], kind


def _row(data: MovieLens, target: Rating, shown: Sequence[int], rejected: int, kind: str) -> Row:
    values = {
        "prompt": prompt_of([data.titles[item] for item in shown]),
        "chosen": data.titles[target.item],
        "rejected": data.titles[rejected],
        "group": str(target.user),
        "user": target.user,
        "item": target.item,
        "kind": kind,
    }
    return Row(values, f"movielens-pairs:user {target.user}, film {target.item}")

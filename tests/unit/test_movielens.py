"""MovieLens: titles as people write them, parts by time, pairs and cases without what must not be in them."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import asdict

import pytest

from alignment.config import SourceConfig
from alignment.data.movielens import (
    DISLIKED,
    LIKED,
    full_title,
    liked_before,
    movielens,
    prompt_of,
    read_movielens,
    short_titles,
)
from alignment.data.movielens_live import live_choices
from alignment.data.movielens_pairs import pair_rows
from alignment.data.recommendation_cases import recommendation_cases
from alignment.data.sources import read_rows
from alignment.feedback_log import event_of
from alignment.recommendation_baselines import ItemNeighbours
from alignment.recommendation_report import case_metrics, means, scores_by


@pytest.mark.parametrize(
    ("title", "year", "full"),
    [
        ("Toy Story", "1995", "Toy Story (1995)"),
        ("Usual Suspects, The", "1995", "The Usual Suspects (1995)"),
        ("Misérables, Les", "1995", "Les Misérables (1995)"),
        ("Enfer, L'", "1994", "L'Enfer (1994)"),
        ("Good, The Bad and The Ugly, The", "1966", "The Good, The Bad and The Ugly (1966)"),
        ("Horseman on the Roof, The (Hussard sur le toit, Le)", "1995", "The Horseman on the Roof (1995)"),
        ("Bye Bye, Love", "1995", "Bye Bye, Love (1995)"),
        ("Land Before Time III (1995)", "V", "Land Before Time III (1995)"),
    ],
)
def test_titles_as_people_write_them(title, year, full):
    assert full_title(title, year) == full


def test_a_prompt_shows_the_most_recent_ones():
    assert prompt_of(list("abcdefg")) == "I liked these films: c; d; e; f; g. Which film should I watch next?"


def test_a_title_has_its_year_where_it_needs_one():
    """Sabrina is two films, and 187 would be taken for the film of that number."""
    full = ["Toy Story (1995)", "Sabrina (1995)", "Sabrina (1954)", "187 (1997)", "8 1/2 (1963)", "M (1931)"]
    assert short_titles(full) == ["Toy Story", *full[1:4], "8 1/2", "M"]
    assert short_titles(["Foo (A)", "Foo (A) (1990)"]) == ["Foo", "Foo (A) (1990)"]


def write(folder, ratings, films):
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    (folder / "inter").write_text("\n".join([header, *("\t".join(map(str, row)) for row in ratings)]) + "\n")
    header = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"
    (folder / "item").write_text("\n".join([header, *("\t".join(map(str, row)) for row in films)]) + "\n")
    return folder / "inter", folder / "item"


FILMS = [(i, f"Film {i}", 1990 + i, "Drama") for i in range(1, 9)]


def test_parts_by_time_and_films_of_one_name(tmp_path):
    films = [*FILMS, (9, "Film 2", 1992, "Drama"), (10, "unkonwn", "unkonwn", "unknown")]
    ratings = [(1, 9, 5, "30.0"), (1, 2, "3.0", 20), (2, 10, 5, 10), (2, 1, 4, 50), (1, 3, 4, 40), (2, 9, 1, 5)]
    data = read_movielens(*write(tmp_path, ratings, films), num_test=2)
    assert list(data.titles) == list(range(1, 9))
    assert data.titles[2] == "Film 2"
    # The second rating of the film of two numbers is passed over, and so is the film without a name.
    assert [(r.user, r.item, r.stars, r.time) for r in data.train] == [(2, 2, 1, 5), (1, 2, 3, 20)]
    assert [(r.user, r.item, r.time) for r in data.test] == [(1, 3, 40), (2, 1, 50)]
    assert data.train_likes() == dict.fromkeys(data.titles, 0)


def test_a_film_numbered_0_is_a_film(tmp_path):
    data = read_movielens(
        *write(tmp_path, [(1, 0, 5, 30), (1, 1, 4, 40)], [(0, "Nought", 1990, "Drama"), *FILMS]), num_test=1
    )
    assert [r.item for r in data.train + data.test] == [0, 1]


def test_a_table_in_another_encoding_is_refused(tmp_path):
    ratings, films = write(tmp_path, [(1, 1, 5, 30), (1, 2, 4, 40)], [*FILMS, (9, "Misérables, Les", 1995, "Drama")])
    films.write_bytes(films.read_text(encoding="utf-8").encode("latin-1"))
    with pytest.raises(ValueError, match=r"item: got byte \d+ that is not UTF-8, expected .*; .*iconv -f latin1"):
        read_movielens(ratings, films, num_test=1)


@pytest.mark.parametrize(
    ("ratings", "films", "fault"),
    [
        ([(1, "x", 5, 30)], FILMS, "inter:2: got 'x', expected a whole number"),
        ([(1, 2, 4.5, 30)], FILMS, "inter:2: got '4.5', expected a whole number"),
        ([(1, 2, 5)], FILMS, "inter:2: got 3 cells, expected 4"),
        ([(1, 2, 6, 30)], FILMS, "inter:2: got 6 stars, expected 1 to 5"),
        (
            [(1, 2, 5, 30)],
            [*FILMS, (2, "Film 9", 1999, "Drama")],
            "item:10: got item 2 again, expected each item once",
        ),
        ([(1, 2, 5, 30)], [(1, " ", 1999, "Drama")], "item:2: got no title, expected each item once, with its title"),
        ([(1, 2, 5, 30)], [(1, "Film")], "item:2: got 2 cells, expected 4"),
        ([(1, 2, 5, 30)], FILMS, "got 1 ratings, expected more than 1"),
        ([(1, 2, 5, 30), (1, 77, 5, 31)], FILMS, "inter:3: got item 77, which item does not name, expected one of"),
    ],
)
def test_broken_tables_are_refused(tmp_path, ratings, films, fault):
    with pytest.raises(ValueError, match=fault):
        read_movielens(*write(tmp_path, ratings, films), num_test=1)


def test_what_pairs_are_made_of(tmp_path):
    """A person who rated all but two films: only those are drawn, and what is in the test part shows nowhere."""
    likes = [(1, film, 5, film) for film in (1, 2, 3, 4, 5)]
    later = [(1, 7, 5, 200), (2, 6, 5, 201)]
    data = read_movielens(*write(tmp_path, [*likes, (1, 6, 1, 6), (2, 8, 5, 7), *later], FILMS), num_test=2)
    rows = [row.values for seed in range(40) for row in pair_rows(data, seed=seed)]
    assert rows == [row.values for seed in range(40) for row in pair_rows(data, seed=seed)]
    assert {row["prompt"] for row in rows} == {
        prompt_of([f"Film {i}" for i in (1, 2, 3)]),
        prompt_of([f"Film {i}" for i in (1, 2, 3, 4)]),
    }
    assert {row["chosen"] for row in rows} == {"Film 4", "Film 5"}
    drawn = {kind: {row["rejected"] for row in rows if row["kind"] == kind} for kind in {r["kind"] for r in rows}}
    assert drawn == {
        "disliked": {"Film 6"},
        "uniform": {"Film 7", "Film 8"},  # 7 is liked in the test part: that is not known here
        "popular": {"Film 8"},
    }


@pytest.fixture(scope="module")
def rows():
    return read_rows(SourceConfig(asset="movielens-pairs"))


def test_the_packaged_pairs(rows):
    data = movielens()
    assert (len(data.titles), len(data.train), len(data.test)) == (1663, 89_721, 9_963)
    assert max(r.time for r in data.train) < min(r.time for r in data.test)
    assert len(read_rows(SourceConfig(asset="movielens-100k"))) == 89_721 + 9_963
    numbers = {title: item for item, title in data.titles.items()}
    assert len(numbers) == len(data.titles)
    ratings = {(r.user, r.item): r for r in data.train}
    for row in rows:
        values = row.values
        chosen = ratings[values["user"], values["item"]]
        assert chosen.stars >= LIKED
        assert data.titles[chosen.item] == values["chosen"]
        rejected = ratings.get((values["user"], numbers[values["rejected"]]))
        assert (rejected is not None) == (values["kind"] == "disliked")
        assert rejected is None or rejected.stars <= DISLIKED
    kinds = Counter(row.values["kind"] for row in rows)
    assert len(rows) == 46_387
    assert kinds["disliked"] < kinds["uniform"]
    assert abs(kinds["uniform"] - kinds["popular"]) < 4 * (kinds["uniform"] + kinds["popular"]) ** 0.5


@pytest.mark.parametrize("early", [False, True])
def test_histories_tell_every_like_of_the_training_part_once(early):
    """Row behind row they are a person's likes in the order of time, but for the first three, which are only shown."""
    data = movielens().without_test() if early else movielens()
    rows = [row.values for row in read_rows(SourceConfig(asset=f"movielens-{'early-' if early else ''}histories"))]
    times = {(r.user, data.titles[r.item]): r.time for r in data.train if r.stars >= LIKED}
    by_user = {user: [row for row in rows if row["user"] == user] for user in {row["user"] for row in rows}}
    for user, own in by_user.items():
        own.sort(key=lambda row: times[user, row["response"].split("; ")[0]])
    assert {title for row in rows for title in row["response"].split("; ")} <= set(data.titles.values())
    told = {(user, title) for user, own in by_user.items() for row in own for title in row["response"].split("; ")}
    assert told <= set(times)
    assert sum(len(row["response"].split("; ")) for row in rows) == len(told)
    likes = Counter(user for user, _ in times)
    assert Counter(user for user, _ in told) == Counter({u: n - 3 for u, n in likes.items() if n > 3})
    for row in rows:
        listed = [times[row["user"], title] for title in row["response"].split("; ")]
        assert listed == sorted(listed)
        assert len(listed) <= 20
        shown = row["prompt"].removeprefix("I liked these films: ").removesuffix(". Which film should I watch next?")
        assert max(times[row["user"], title] for title in shown.split("; ")) <= listed[0]
        assert 3 <= len(shown.split("; ")) <= 5
        times_shown = [times[row["user"], title] for title in shown.split("; ")]
        assert times_shown == sorted(times_shown)


def test_prompts_show_what_was_liked_before(rows):
    data, draw = movielens(), random.Random(1)
    every = data.rated("train")
    for row in draw.sample(rows, 300):
        own = every[row.values["user"]]
        time = next(r.time for r in own if r.item == row.values["item"])
        shown = [r.item for r in own if r.stars >= LIKED and r.time < time][-5:]
        assert row.values["prompt"] == prompt_of([data.titles[item] for item in shown])


def test_the_packaged_cases():
    data = movielens()
    cases = recommendation_cases(data)
    assert len(cases) == len({case.user for case in cases}) == 153
    every, popularity = data.rated(), data.train_likes()
    for case in cases:
        rated = {r.item for r in every[case.user]}
        target = next(r for r in data.test if (r.user, r.item) == (case.user, case.positive))
        assert list(case.liked) == liked_before(every[case.user], target.time)
        assert len(case.liked) >= 3
        for protocol in ("uniform", "popular"):
            positive, *negatives = case.candidates(protocol)
            assert positive == case.positive
            assert len(set(negatives)) == 99
            assert not rated & set(negatives)
        assert set(case.films) == {case.positive, *case.uniform, *case.popular}
    mean = {
        protocol: sum(popularity[i] for case in cases for i in getattr(case, protocol)) / (99 * len(cases))
        for protocol in ("uniform", "popular")
    }
    assert mean["popular"] > 3 * mean["uniform"]
    assert cases == recommendation_cases(data)
    likes = [(r.user, r.item) for r in data.train if r.stars >= LIKED]
    told = {
        "popularity": scores_by(lambda liked, films: [popularity[film] for film in films], cases),
        "neighbours": scores_by(ItemNeighbours(likes).scores, cases),
    }
    # What docs/recommender.md says of the baselines.
    found = {name: means(cases, case_metrics(cases, scores)) for name, scores in told.items()}
    assert list(found["popularity"].values()) == pytest.approx([0.614, 0.359, 0.261, 0.131], abs=5e-4)
    assert list(found["neighbours"].values()) == pytest.approx([0.680, 0.483, 0.490, 0.301], abs=5e-4)
    several = recommendation_cases(data, per_user=3)
    assert Counter(case.user for case in several).most_common(1)[0][1] == 3
    assert [case for case in several if case in cases] == cases


def test_too_few_films_are_refused_by_what_asks_for_them(tmp_path):
    rated = [(1, i, 5, i) for i in range(1, 6)] + [(2, i, 5, 10 + i) for i in range(1, 3)]
    data = read_movielens(*write(tmp_path, rated, FILMS), num_test=3)
    with pytest.raises(
        ValueError, match=r"user 1: got 0 films that others liked .*, expected 2 to show .*larger table"
    ):
        live_choices(data, num_shown=3)
    with pytest.raises(ValueError, match=r"user 1: got 0 films that others liked .*, expected 2; lower films"):
        recommendation_cases(data, num_negatives=2)


def test_choices_of_live_people():
    """Of a table without the last 10,000 ratings: people choose, and are asked about what they liked later."""
    data = movielens().without_test()
    assert not set(data.train + data.test) & set(movielens().test)
    assert len(data.test) == 10_000
    assert data.train + data.test == movielens().train
    events, last = live_choices(data, per_user=5)
    cases = recommendation_cases(data, after=last, per_user=3)
    every = data.rated()
    times = [next(r.time for r in every[int(e.user)] if r.item == int(e.chosen)) for e in events]
    assert times == sorted(times)
    assert min(times) >= data.test[0].time
    assert len({event.id for event in events}) == len(events)
    assert Counter(event.user for event in events).most_common(1)[0][1] == 5
    shown_early = 0
    for event, time in zip(events, times, strict=True):
        assert event_of(asdict(event)) == event
        own = every[int(event.user)]
        shown = {int(item) for item in event.shown}
        assert shown & {r.item for r in own if r.time <= time} == {int(event.chosen)}
        shown_early += len(shown & {r.item for r in own if r.time > time})
        assert event.liked == tuple(str(item) for item in liked_before(own, time)[-5:])
        assert time <= last[int(event.user)]
    # Drawn by popularity: with films drawn from all, a choice could be told by how well known it is.
    popularity = data.train_likes()
    shown = [popularity[int(item)] for event in events for item in event.shown if item != event.chosen]
    assert sum(shown) / len(shown) > 3 * sum(popularity.values()) / len(popularity)
    # A film of later is passed over like any other. Were it never shown, its absence would tell what is asked for.
    assert shown_early > 100
    assert {case.user for case in cases} <= last.keys()
    chosen = {(int(event.user), int(event.chosen)) for event in events}
    assert not chosen & {(case.user, case.positive) for case in cases}
    assert all(r.time > last[case.user] for case in cases for r in every[case.user] if r.item == case.positive)
    places = Counter(event.shown.index(event.chosen) for event in events)
    assert all(abs(places[i] - len(events) / 10) < 4 * (len(events) / 10) ** 0.5 for i in range(10))


def test_films_by_number_and_by_title():
    data = movielens()
    for known in (data, data.without_test()):
        assert known.title("50") == known.title("Star Wars") == known.title("Star Wars (1977)") == "Star Wars"
        assert known.title("Sabrina (1954)") == "Sabrina (1954)"
    assert [data.title(name) for name in ("0", "99999999999", "Star Wars (1978)", "Sabrina", "²", "")] == [None] * 6
    assert len(data.shown_titles("1")) == 5
    assert data.shown_titles("nobody") is None

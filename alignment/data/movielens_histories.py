"""What people liked one film after the other, out of MovieLens: for a supervised stage.

A pair tells of two titles behind a prompt of five. A row here tells of twenty behind the same prompt, and each of
their tokens is learnt from: titles, how often they are liked, and which films the same people like.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from alignment.data.files import Row
from alignment.data.movielens import LEAST_SHOWN, LIKED, MovieLens, movielens, prompt_of
from alignment.data.split import digest

SEED = 0
LISTED = 20
"""Titles of an answer, at most."""


def history_rows() -> Iterator[Row]:
    """Rows with `prompt`, `response` (up to `LISTED` titles), `group` (the person) and `user`. They come in the order
    of a hash, so that any first ones are a sample."""
    yield from _rows(movielens())


def early_history_rows() -> Iterator[Row]:
    """The same without the last 10,000 ratings of the training part, see `alignment.data.movielens_live`."""
    yield from _rows(movielens().without_test())


def history_rows_of(data: MovieLens, *, seed: int) -> Iterator[Row]:
    """Each person's likes of the training part, cut into rows that follow one another: what one lists the next
    begins behind.

    Films that were rated in the same second come in a drawn order, since nobody knows theirs.
    """
    for user, ratings in sorted(data.rated("train").items()):
        draw = random.Random(f"{seed}:{user}")
        likes = sorted((rating.time, draw.random(), rating.item) for rating in ratings if rating.stars >= LIKED)
        titles = [data.titles[item] for *_, item in likes]
        for start in range(LEAST_SHOWN, len(titles), LISTED):
            values = {
                "prompt": prompt_of(titles[:start]),
                "response": "; ".join(titles[start : start + LISTED]),
                "group": str(user),
                "user": user,
            }
            yield Row(values, f"movielens-histories:user {user}, like {start + 1}")


def _rows(data: MovieLens) -> list[Row]:
    return sorted(history_rows_of(data, seed=SEED), key=lambda row: digest(row.where))

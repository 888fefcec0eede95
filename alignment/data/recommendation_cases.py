"""Who is to be recommended what: one film that a person liked next, hidden among films that the person never rated.

Two protocols of 99 negatives: `uniform` draws them from all films (He et al. 2017), `popular` in proportion to how
often each was liked in training (Sun et al. 2019), both without replacement. Every method ranks the same cases.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from alignment.data.movielens import LEAST_SHOWN, LIKED, MovieLens, liked_before, prompt_of

NUM_NEGATIVES = 99
PROTOCOLS = ("uniform", "popular")


@dataclass(frozen=True, kw_only=True, slots=True)
class RecommendationCase:
    """One question with the answer that is to come first."""

    user: int
    liked: tuple[int, ...]
    """All films that the person liked before, oldest first."""
    positive: int
    uniform: tuple[int, ...]
    popular: tuple[int, ...]

    def candidates(self, protocol: str) -> tuple[int, ...]:
        """The positive, then the negatives of a protocol."""
        return (self.positive, *(self.uniform if protocol == "uniform" else self.popular))

    @property
    def films(self) -> tuple[int, ...]:
        """What both protocols ask of, each film once: the positive first."""
        return tuple(dict.fromkeys([self.positive, *self.uniform, *self.popular]))

    def prompt(self, data: MovieLens) -> str:
        """As in training: the most recent liked titles."""
        return prompt_of([data.titles[item] for item in self.liked])


def recommendation_cases(
    data: MovieLens,
    *,
    per_user: int = 1,
    num_negatives: int = NUM_NEGATIVES,
    seed: int = 0,
    after: Mapping[int, int] | None = None,
) -> list[RecommendationCase]:
    """The first liked films of the test part of each person who liked `LEAST_SHOWN` before, in the order of persons.

    What was liked before includes what was liked in the test part: it is known when the question is asked, and nothing
    is trained on it. No negative is a film that the person rated at any time.

    Args:
        per_user: cases of a person at most, the earliest.
        after: of the persons to ask about, the second after which a film was liked that is asked for; None asks about
            all persons, from the beginning of the test part.

    Raises:
        ValueError: too few films that a person never rated.
    """
    popularity = data.train_likes()
    films = sorted(data.titles)
    every = data.rated()
    cases = []
    for user, in_test in sorted(data.rated("test").items()):
        rated = {rating.item for rating in every[user]}
        known = [(rating, liked_before(every[user], rating.time)) for rating in in_test if rating.stars >= LIKED]
        begin = -1 if after is None else after.get(user, math.inf)
        asked = [(rating, liked) for rating, liked in known if len(liked) >= LEAST_SHOWN and rating.time > begin]
        for rating, liked in asked[:per_user]:
            draw = random.Random(f"{seed}:{user}:{rating.item}")
            uniform = _without(films, rated)
            if len(uniform) < num_negatives:
                raise ValueError(
                    f"user {user}: got {len(uniform)} films never rated, expected {num_negatives}; lower "
                    "films.num_negatives"
                )
            weights = {film: popularity[film] for film in uniform if popularity[film]}
            if len(weights) < num_negatives:
                raise ValueError(
                    f"user {user}: got {len(weights)} films that others liked and this one never rated, expected "
                    f"{num_negatives}; lower films.num_negatives"
                )
            case = RecommendationCase(
                user=user,
                liked=tuple(liked),
                positive=rating.item,
                uniform=tuple(draw.sample(uniform, num_negatives)),
                popular=weighted_sample(weights, num_negatives, draw),
            )
            cases.append(case)
    return cases


def weighted_sample(weights: dict[int, int], count: int, draw: random.Random) -> tuple[int, ...]:
    """Draw one after the other without replacement, each in proportion to its weight among those that are left.

    The largest u^(1/w), u uniform on (0, 1), are such a draw (Efraimidis and Spirakis 2006); here as the smallest
    -ln(u) / w, which does not underflow. There are `count` weights at least.
    """
    assert len(weights) >= count, "whoever draws refuses what is too few"
    # 1 - random() lies in (0, 1]: the logarithm exists.
    keys = {item: -math.log(1 - draw.random()) / weight for item, weight in weights.items()}
    return tuple(sorted(keys, key=lambda item: keys[item])[:count])


def _without(films: Sequence[int], rated: Collection[int]) -> list[int]:
    return [film for film in films if film not in rated]

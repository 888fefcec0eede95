"""People of the test part who choose among ten films, as feedback that arrives while a policy learns.

Each choice is a film that the person did like next, among films that the person had not rated by then; what was rated
later is drawn like any other, since a model could learn from what is never shown. What is asked about them before and
after (`recommendation_cases` with `after`) are films that they liked later than their last choice.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from alignment.data.movielens import LEAST_SHOWN, LIKED, SHOWN, MovieLens, liked_before
from alignment.data.recommendation_cases import weighted_sample
from alignment.feedback_log import FeedbackEvent

NUM_SHOWN = 10


def live_choices(
    data: MovieLens, *, per_user: int = 5, num_shown: int = NUM_SHOWN, seed: int = 0
) -> tuple[list[FeedbackEvent], dict[int, int]]:
    """The first choices of each person, oldest first, and when each person's last one was.

    What is shown beside the chosen film is drawn in proportion to how often films were liked in training. Films go by
    their numbers, and an event says what was liked before it.

    Args:
        per_user: choices of a person at most.

    Raises:
        ValueError: too few films that a person had not rated.
    """
    popularity = {item: count for item, count in data.train_likes().items() if count}
    every = data.rated()
    timed: list[tuple[int, FeedbackEvent]] = []
    last: dict[int, int] = {}
    for user, in_test in sorted(data.rated("test").items()):
        known = [(rating, liked_before(every[user], rating.time)) for rating in in_test if rating.stars >= LIKED]
        for rating, liked in [pair for pair in known if len(pair[1]) >= LEAST_SHOWN][:per_user]:
            rated = {other.item for other in every[user] if other.time <= rating.time}
            open_to = {item: count for item, count in popularity.items() if item not in rated}
            if len(open_to) < num_shown - 1:
                raise ValueError(
                    f"user {user}: got {len(open_to)} films that others liked and this one had not rated, expected "
                    f"{num_shown - 1} to show beside a choice; use a larger table"
                )
            draw = random.Random(f"{seed}:{user}:{rating.item}")
            shown = [rating.item, *weighted_sample(open_to, num_shown - 1, draw)]
            draw.shuffle(shown)
            timed.append((rating.time, _choice(user, rating.item, shown, liked[-SHOWN:])))
            last[user] = rating.time
    # Sorting is stable: choices of one second stay in the order of persons.
    return [event for _, event in sorted(timed, key=lambda pair: pair[0])], last


def _choice(user: int, chosen: int, shown: Sequence[int], liked: Sequence[int]) -> FeedbackEvent:
    return FeedbackEvent(
        id=f"replay-{user}-{chosen}",
        user=str(user),
        shown=tuple(map(str, shown)),
        chosen=str(chosen),
        liked=tuple(map(str, liked)),
    )

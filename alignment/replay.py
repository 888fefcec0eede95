"""Which pairs an optimiser step of a round learns from: those of the round, and some of earlier ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from alignment.data.mixing import Mixture
from alignment.data.split import digest

T = TypeVar("T")


def replay_batch(
    rounds: Sequence[Sequence[T]], step: int, *, batch_size: int, replay_share: float, seed: int
) -> list[T]:
    """The records of one step: a pure function of its arguments, so that a resumed run needs no state.

    Over the steps of a round the shares are exact up to rounding. The round's own records come in shuffled epochs, and
    so do those of all earlier rounds together.

    Args:
        rounds: records of every round so far; the last one is the round itself, which has some.
        step: of the round, from 0.
        replay_share: of the batch, from earlier rounds where these have any.
    """
    fresh, earlier = rounds[-1], [record for records in rounds[:-1] for record in records]
    parts, weights = [fresh], [1.0]
    if earlier and replay_share:
        parts, weights = [fresh, earlier], [1.0 - replay_share, replay_share]
    # A seed of the round: permutations of one round say nothing of the next one's.
    own = int(digest(f"{seed}:round {len(rounds) - 1}"), 16)
    mixture = Mixture([len(part) for part in parts], weights, seed=own)
    return [parts[part][index] for part, index in mixture.batch(step, batch_size)]

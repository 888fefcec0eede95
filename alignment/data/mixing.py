"""Which row comes n-th: shuffled epochs and mixtures as pure functions of n, so that a resumed run needs no state."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from alignment.data.split import digest


def apportion(count: int, weights: Sequence[float]) -> list[int]:
    """How many of the first `count` samples come from each source.

    The divisor method of Webster and Sainte-Laguë: sample i of a source (from 0) stands at (i + 1/2) / weight, and
    the mixture is the sources' samples in that order. So the counts never fall as `count` grows, and over any window
    they are the exact shares up to rounding.

    Args:
        weights: positive; only their ratios matter.
    """
    total = math.fsum(weights)
    # Nobody is further than half a sample a source from the exact share: from there a few steps are left.
    slack = len(weights) / 2 + 1
    taken = [max(0, math.ceil(count * weight / total - slack)) for weight in weights]
    for _ in range(count - sum(taken)):
        taken[next_source(taken, weights)] += 1
    return taken


def next_source(taken: Sequence[int], weights: Sequence[float]) -> int:
    """The source of the next sample, when `taken` came from each; of several the first."""
    return min(range(len(weights)), key=lambda source: (taken[source] + 0.5) / weights[source])


class Mixture:
    """Which items of which part the steps of a run take, as a pure function of the step.

    Every epoch of a part is a permutation of it, and a batch may hold the end of one and the beginning of the next.
    Parts are mixed by `apportion`.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], *, seed: int) -> None:
        self._sizes, self._weights, self._seed = sizes, weights, seed
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # of each part the latest epoch and its order

    def batch(self, step: int, batch_size: int) -> list[tuple[int, int]]:
        """`(part, index in it)` of each item of a step, from 0."""
        taken = apportion(step * batch_size, self._weights)
        items = []
        for _ in range(batch_size):
            part = next_source(taken, self._weights)
            items.append((part, self._index(part, taken[part])))
            taken[part] += 1
        return items

    def _index(self, part: int, place: int) -> int:
        epoch, at = divmod(place, self._sizes[part])
        held = self._orders.get(part)
        if held is None or held[0] != epoch:
            order = epoch_order(self._sizes[part], f"{self._seed}:{part}:{epoch}")
            held = self._orders[part] = (epoch, order)
        return int(held[1][at])


def epoch_order(count: int, name: str) -> np.ndarray:
    """A permutation of 0 .. count - 1 that depends on `count` and `name` alone, in every version of every library.

    Rows are sorted by a hash of their number: SplitMix64 (Steele, Lea and Flood 2014), seeded with the name.
    """
    with np.errstate(over="ignore"):
        state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        state += np.uint64(int(digest(name), 16))
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return np.argsort(state, kind="stable")

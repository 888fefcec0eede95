"""Whether scores mean what they say: calibration, rank correlation, and what length alone would have decided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

NUM_BINS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Bin:
    """Predictions in [low, high), the last bin's in [low, high]."""

    low: float
    high: float
    count: int
    predicted: float | None
    """Their mean; None where there is none."""
    observed: float | None
    """Mean outcome of the same items."""


def calibration_table(
    predicted: Sequence[float], observed: Sequence[float], *, low: float = 0.0, high: float = 1.0
) -> list[Bin]:
    """Ten bins of one width over [low, high].

    Args:
        predicted: probabilities in [low, high].
        observed: what came, 0 .. 1, of the same items.
    """
    width = (high - low) / NUM_BINS
    places = [min(NUM_BINS - 1, int((p - low) / width)) for p in predicted]
    bins = []
    for number in range(NUM_BINS):
        inside = [i for i, place in enumerate(places) if place == number]
        bins.append(
            Bin(
                low=low + number * width,
                high=low + (number + 1) * width,
                count=len(inside),
                predicted=math.fsum(predicted[i] for i in inside) / len(inside) if inside else None,
                observed=math.fsum(observed[i] for i in inside) / len(inside) if inside else None,
            )
        )
    return bins


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """Mean distance of predicted and observed, bins weighted by their items (Naeini 2015; Guo 2017, arXiv
    1706.04599)."""
    filled = [(one.count, one.predicted, one.observed) for one in bins]
    gaps = [n * abs(p - o) for n, p, o in filled if p is not None and o is not None]
    return math.fsum(gaps) / sum(one.count for one in bins)


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Rank correlation, ties at their mean rank (Spearman 1904); None where one of the two is constant, or for fewer
    than two items."""
    if len(x) != len(y):
        raise ValueError(f"got {len(x)} and {len(y)} items, expected the same number; pair them")
    if len(x) < 2:
        return None
    a, b = mean_ranks(x), mean_ranks(y)
    middle = (len(x) - 1) / 2
    cross = math.fsum((p - middle) * (q - middle) for p, q in zip(a, b, strict=True))
    scale = math.fsum((p - middle) ** 2 for p in a) * math.fsum((q - middle) ** 2 for q in b)
    return cross / math.sqrt(scale) if scale else None


def mean_ranks(x: Sequence[float]) -> list[float]:
    """Rank of each item from 0, ties at the mean of theirs."""
    order = sorted(range(len(x)), key=lambda i: x[i])
    ranks = [0.0] * len(x)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and x[order[end + 1]] == x[order[start]]:
            end += 1
        for place in range(start, end + 1):
            ranks[order[place]] = (start + end) / 2
        start = end + 1
    return ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class Threshold:
    """Says yes from `bound` on, or below it: the best single cut through one number."""

    bound: float
    above: bool

    def __call__(self, x: float) -> bool:
        return (x >= self.bound) == self.above


def best_threshold(x: Sequence[float], yes: Sequence[bool]) -> Threshold:
    """The cut that most items obey; of several the lowest bound, and yes above it first."""
    cuts = [
        (sum(Threshold(bound=bound, above=above)(a) == b for a, b in zip(x, yes, strict=True)), -bound, above)
        for bound in _bounds(x)
        for above in (True, False)
    ]
    _, bound, above = max(cuts)
    return Threshold(bound=-bound, above=above)


def _bounds(x: Sequence[float]) -> list[float]:
    """At most a hundred values that lie in the data, evenly by rank, the lowest among them."""
    values = sorted(set(x))
    return values[:: max(1, -(-len(values) // 100))]

"""The final number of an answer against a number, a tolerance, or limits, in the unit that is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from numbers import Rational, Real
from typing import Any

from rewards.base import only_where
from rewards.quantities import Quantity, parse_quantity, stated_quantities
from rewards.reading import final_answer, plain
from rewards.units import SHARE, Unit, convert, unit


@dataclass(frozen=True, slots=True)
class Gold:
    """What is right: from `lower` to `upper`, both included, in `measured` where that is known."""

    lower: Fraction | None
    upper: Fraction | None
    measured: Unit | None

    def accepts(self, quantity: Quantity, unit_required: bool) -> bool:
        value: Fraction | None = quantity.value
        given = unit(quantity.unit)
        if self.measured is not None:
            if given is None and unit_required:
                return False
            if given is not None:
                value = convert(quantity.value, given, self.measured)
        elif given is not None and given.dimensions == SHARE.dimensions and self._holds(quantity.value * given.factor):
            return True  # 75% where 0.75 is asked for
        return value is not None and self._holds(value)

    def distance(self, quantity: Quantity) -> Fraction | None:
        """From `lower`, in the gold's unit; None for a quantity of another kind."""
        given, value = unit(quantity.unit), quantity.value
        if self.measured is not None and given is not None:
            converted = convert(value, given, self.measured)
            return None if converted is None or self.lower is None else abs(converted - self.lower)
        return None if self.lower is None else abs(value - self.lower)

    def _holds(self, value: Fraction) -> bool:
        return (self.lower is None or value >= self.lower) and (self.upper is None or value <= self.upper)


def check_tolerance(*, relative_tolerance: float) -> None:
    """Raises ValueError for one below 0."""
    if relative_tolerance < 0:
        raise ValueError(f"got relative_tolerance {relative_tolerance:g}, expected 0 or more; raise it")


@only_where(check_tolerance)
def final_number(
    prompts: list[str],
    responses: list[str],
    *,
    answer: list[Any],
    lower: list[Any] | None = None,
    upper: list[Any] | None = None,
    tolerance: list[Any] | None = None,
    unit: list[Any] | None = None,
    relative_tolerance: float = 1e-4,
    unit_required: bool = False,
    expressions: bool = False,
    **columns: Any,
) -> list[float | None]:
    r"""1 where the number that the answer settles on is right, else 0.

    It is what stands in \boxed, else behind "the answer is" or 答案是, else behind the last equals sign, else the
    last number; statements that differ must each be right, and a list or a range settles on nothing.

    Args:
        answer: a number, or text such as "3.2 mg/dL", "3/4", "1,200".
        lower: with or without `upper`, the limits, included; they count before the tolerance.
        tolerance: absolute, on either side of `answer`.
        unit: of all of these; without it the one that `answer` names. Answers in another unit of the same kind are
            converted, those of another kind score 0.
        relative_tolerance: where a row has neither limits nor a tolerance.
        unit_required: whether an answer without a known unit scores 0 where the row has one.
        expressions: whether arithmetic left to the reader ("12 * 7") is a number.

    Returns:
        None where the row has no number to compare with.
    """
    nothing = [None] * len(prompts)
    golds = zip(answer, lower or nothing, upper or nothing, tolerance or nothing, unit or nothing, strict=True)
    scores: list[float | None] = []
    for response, row in zip(responses, golds, strict=True):
        gold = read_gold(*row, relative_tolerance=relative_tolerance)
        right = None if gold is None else is_right(response, gold, unit_required, expressions)
        scores.append(None if right is None else float(right))
    return scores


def check_reach(*, reach: float) -> None:
    """Raises ValueError for one that is not above 0."""
    if not reach > 0:
        raise ValueError(f"reach: got {reach}, expected a number above 0; set it to 0.25, say")


@only_where(check_reach)
def near_number(
    prompts: list[str],
    responses: list[str],
    *,
    answer: list[Any],
    unit: list[Any] | None = None,
    reach: float = 0.25,
    **columns: Any,
) -> list[float | None]:
    """How near the number is that the answer settles on: 1 at the row's, falling in proportion to 0 at `reach` away.

    Partial credit that says more than right or wrong while most answers are wrong. `x` scores
    max(0, 1 - |x - answer| / (reach |answer|)); of several numbers stated the farthest counts.

    Args:
        answer, unit: as in `final_number`.
        reach: relative to the answer, above 0.

    Returns:
        None where the row has no number to compare with.
    """
    check_reach(reach=reach)
    scores: list[float | None] = []
    for response, value, named in zip(responses, answer, unit or [None] * len(answer), strict=True):
        gold = read_gold(value, None, None, None, named, relative_tolerance=0.0)
        scores.append(None if gold is None else _nearness(response, gold, Fraction(reach)))
    return scores


def _nearness(response: str, gold: Gold, reach: Fraction) -> float:
    stated = stated_quantities(final_answer(response))
    assert gold.lower is not None
    width = reach * abs(gold.lower)
    # Right in another way of writing, a percentage for instance, is no distance.
    off = [Fraction(0) if gold.accepts(one, False) else gold.distance(one) for one in stated]
    if not off or None in off:
        return 0.0
    farthest = max(distance for distance in off if distance is not None)
    return float(max(Fraction(0), 1 - farthest / width)) if width else float(farthest == 0)


def is_right(response: str, gold: Gold, unit_required: bool = False, expressions: bool = False) -> bool:
    """Whether everything that the response states as its number is right, and it states one."""
    stated = stated_quantities(final_answer(response), expressions=expressions)
    return bool(stated) and all(gold.accepts(one, unit_required) for one in stated)


def read_gold(
    answer: Any, lower: Any, upper: Any, tolerance: Any, named: Any, *, relative_tolerance: float
) -> Gold | None:
    """The limits of a row; None where it has none that can be read."""
    try:
        return _gold(answer, lower, upper, tolerance, named, relative_tolerance)
    except TypeError:  # a list or a mapping, where a number belongs
        return None


@lru_cache(maxsize=1024, typed=True)
def _gold(answer: Any, lower: Any, upper: Any, tolerance: Any, named: Any, relative_tolerance: float) -> Gold | None:
    gold = as_quantity(answer)
    measured = unit(plain(named)) if isinstance(named, str) else unit(gold.unit) if gold else None
    low, high, width = as_quantity(lower), as_quantity(upper), as_quantity(tolerance)
    if low is not None and high is not None and low.value > high.value:
        return None
    if low is not None or high is not None:
        return Gold(low.value if low else None, high.value if high else None, measured)
    if gold is None:
        return None
    margin = width.value if width else abs(gold.value) * Fraction(relative_tolerance)
    return Gold(gold.value - abs(margin), gold.value + abs(margin), measured)


def as_quantity(value: Any) -> Quantity | None:
    """A number of a data set, or text that begins with one; None for anything else."""
    if isinstance(value, str):
        return parse_quantity(plain(value))
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        return None
    if isinstance(value, Rational):
        return Quantity(Fraction(int(value.numerator), int(value.denominator)))
    return Quantity(Fraction(repr(float(value))))

"""Medical calculators: the final value within its limits, else credit for steps that were worked out.

How partial credit is given, fixed before any run was scored by it: a row may list in `steps` the values on the way to
its answer. A step counts as worked out where the answer (its reasoning included) has a number behind an equals sign
(=, ≈, 等于, 约为) that is within STEP_TOLERANCE of it, relatively. A value that stands in the prompt is no step. An
answer with more than MAX_EQUATIONS such numbers (and four more a step) is spam and gets nothing for steps. The score
of a wrong final value is `partial` times the share of steps worked out; a right one scores 1 with or without steps, so
that no way of writing is preferred. Limits follow MedCalc-Bench (Khandekar et al. 2024): 5 % around the value of an
equation.
"""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from typing import Any

from rewards.base import only_where
from rewards.numbers import as_quantity, check_tolerance, final_number
from rewards.quantities import numbers_in
from rewards.reading import plain

STEP_TOLERANCE = Fraction(1, 200)
MAX_READ = 8_000
"""Characters at the end of an answer in which steps are looked for."""
MAX_EQUATIONS = 8
"""And four more for each step."""


def check_credit(*, partial: float, relative_tolerance: float) -> None:
    """Raises ValueError for credit that is no share, or a tolerance below 0."""
    if not 0 <= partial <= 1:
        raise ValueError(f"got partial {partial:g}, expected a share of a right answer, from 0 to 1; correct it")
    check_tolerance(relative_tolerance=relative_tolerance)


@only_where(check_credit)
def calculated(
    prompts: list[str],
    responses: list[str],
    *,
    answer: list[Any],
    lower: list[Any] | None = None,
    upper: list[Any] | None = None,
    tolerance: list[Any] | None = None,
    unit: list[Any] | None = None,
    steps: list[Any] | None = None,
    partial: float = 0.3,
    relative_tolerance: float = 0.05,
    **columns: Any,
) -> list[float | None]:
    """1 where the final number is right (see numbers:final_number), else `partial` times the share of its steps.

    Args:
        answer, lower, upper, tolerance, unit: as in numbers:final_number.
        steps: of each row the values on the way to its answer, numbers.
        partial: what all steps are worth without the right answer.
        relative_tolerance: where a row has neither limits nor a tolerance.

    Returns:
        None where the row has no number to compare with.
    """
    final = final_number(
        prompts,
        responses,
        answer=answer,
        lower=lower,
        upper=upper,
        tolerance=tolerance,
        unit=unit,
        relative_tolerance=relative_tolerance,
    )
    rows = zip(prompts, responses, steps or [None] * len(prompts), final, strict=True)
    return [partial * share_of_steps(*row) if score == 0.0 else score for *row, score in rows]


def share_of_steps(prompt: str, response: str, steps: Any) -> float:
    """The share of the steps that an answer works out, by the rule at the top of this module."""
    read = [as_quantity(step) for step in steps] if isinstance(steps, list | tuple) else []
    wanted = [step.value for step in read if step is not None]
    wanted = [step for step in wanted if not any(_close(step, other) for other in _numbers(prompt))]
    if not wanted:
        return 0.0
    said = numbers_in(plain(response[-MAX_READ:]), after_equals=True)
    if len(said) > MAX_EQUATIONS + 4 * len(wanted):
        return 0.0
    return sum(any(_close(step, number) for number in said) for step in wanted) / len(wanted)


@lru_cache(maxsize=256)
def _numbers(prompt: str) -> tuple[Fraction, ...]:
    return tuple(numbers_in(plain(prompt[-MAX_READ:])))


def _close(step: Fraction, number: Fraction) -> bool:
    return abs(step - number) <= abs(step) * STEP_TOLERANCE

"""Medical calculators as arithmetic drills: answers are equations alone, which a small model can learn.

Lessons are to be imitated, practice is to be answered and scored; both ask the same calculators with other numbers.
Kept are calculators of one or two equations, right as they stand, which the tests compute; not those whose answer is a
small difference of large numbers, where 5 % forgives no slip.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from alignment.data.calculators import is_held_out, questions
from alignment.data.files import Row

DRILLED = (
    "bmi",
    "ideal-weight",
    "mean-arterial-pressure",
    "corrected-calcium",
    "corrected-sodium",
    "ldl",
)
ROWS_PER_CALCULATOR = 200
LESSONS, PRACTICE = 1, 2
"""Seeds: with another one the numbers are others, and 0 is that of the assets with full explanations."""

_UNIT = re.compile(
    r"(?<=[\d)])\s*(?:\(?in [A-Za-z/]+\)|\(mEq/L\)|mm Hg|mEq/L|mmol|mg/dL|g/dL|kg|cm|in/cm|in|m)(?![A-Za-z])"
)
_NUMBER = r"\d+(?:\.\d+)?"
_EQUATION = re.compile(rf"((?<![\d)] )-?\(*{_NUMBER}(?:[\s()*/+-]|{_NUMBER})*?)\s*=\s*(-?{_NUMBER})")


def lesson_rows() -> Iterator[Row]:
    """Rows to imitate: `prompt`, `completion`, and the columns of the questions."""
    yield from _drills(LESSONS)


def practice_rows() -> Iterator[Row]:
    """Rows to answer, none of which is a lesson: the same columns."""
    known = {row.values["prompt"] for row in lesson_rows()}
    yield from (row for row in _drills(PRACTICE) if row.values["prompt"] not in known)


def equations(explanation: str) -> list[str]:
    """Each `numbers = result` of a worked explanation, in order, without units."""
    bare = _UNIT.sub("", explanation)
    return [f"{left.strip()} = {right}" for left, right in _EQUATION.findall(bare)]


def _drills(seed: int) -> Iterator[Row]:
    assert not any(is_held_out(name) for name in DRILLED)
    for row in questions(seed=seed, held_out=False, rows_per_calculator=ROWS_PER_CALCULATOR):
        if row.values["group"] in DRILLED:
            yield Row(_drill(row.values), row.where)


def _drill(values: dict[str, Any]) -> dict[str, Any]:
    """A question of the calculators whose completion is its equations and the answer.

    The calculator goes by a column of its own: under `group` a split would hold out whole calculators, whose formula
    no practice can teach.
    """
    working = "\n".join(equations(values["completion"]))
    chinese = "。" in values["prompt"]
    ending = f"答案是 {values['answer']:g}" if chinese else f"The answer is {values['answer']:g}"
    rest = {name: value for name, value in values.items() if name not in ("group", "completion")}
    return {**rest, "completion": f"{working}\n{ending}", "calculator": values["group"]}

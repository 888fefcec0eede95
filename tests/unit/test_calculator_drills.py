"""Calculators as drills: every equation holds, every lesson is right by its own rule, practice asks other numbers."""

from __future__ import annotations

import pytest

from alignment.data.calculator_drills import DRILLED, equations, lesson_rows, practice_rows
from rewards.arithmetic import evaluate, number
from rewards.calculators import calculated

COLUMNS = ("answer", "lower", "upper", "unit", "steps")


@pytest.fixture(scope="module")
def lessons():
    return [row.values for row in lesson_rows()]


def test_the_equations_of_every_lesson_hold(lessons):
    for lesson in lessons:
        *working, ending = lesson["completion"].split("\n")
        assert working, lesson
        for line in working:
            left, _, result = line.partition(" = ")
            assert float(evaluate(left)) == pytest.approx(float(number(result)), abs=6e-4), (
                lesson["calculator"],
                line,
            )
        assert float(number(result)) == pytest.approx(lesson["answer"])
        assert ending in (f"The answer is {lesson['answer']:g}", f"答案是 {lesson['answer']:g}")


def test_every_lesson_scores_one_by_its_rule_and_its_working_alone_the_share_of_its_steps(lessons):
    columns = {name: [lesson[name] for lesson in lessons] for name in COLUMNS}
    prompts = [lesson["prompt"] for lesson in lessons]
    assert set(calculated(prompts, [lesson["completion"] for lesson in lessons], **columns)) == {1.0}
    wrong = ["\n".join(lesson["completion"].split("\n")[:-1]) + "\nThe answer is 987654" for lesson in lessons]
    names = [lesson["calculator"] for lesson in lessons]
    expected = {(name, 0.3 if name in ("bmi", "ideal-weight") else 0.0) for name in DRILLED}
    assert set(zip(names, calculated(prompts, wrong, **columns), strict=True)) == expected


def test_practice_asks_the_same_calculators_for_other_numbers(lessons):
    practice = [row.values for row in practice_rows()]
    assert {row["calculator"] for row in practice} == {row["calculator"] for row in lessons} == set(DRILLED)
    assert not {lesson["prompt"] for lesson in lessons} & {row["prompt"] for row in practice}
    assert len(practice) > 1000
    assert all("group" not in row for row in practice)


def test_equations_are_read_without_units_and_words():
    text = "gives us 150 mEq/L - (110 mEq/L + 26 mEq/L) = 14 mEq/L. Then 2.3 kg * (63.78 (in inches) - 60) = 8.694 kg."
    assert equations(text) == ["150 - (110 + 26) = 14", "2.3 * (63.78 - 60) = 8.694"]
    assert equations("we get -5 (mEq/L) + 2.5 * (4 - 1.8 (in g/dL)) = 0.5 mEq/L") == ["-5 + 2.5 * (4 - 1.8) = 0.5"]
    assert equations("The RR interval is x = 3, and y = z.") == []

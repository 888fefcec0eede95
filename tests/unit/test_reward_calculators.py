"""Calculator rewards: limits, the rule of partial credit, and rows of the data builder scored by their own answers."""

from __future__ import annotations

import time

import pytest

from alignment.data.calculators import questions
from rewards.calculators import calculated, share_of_steps

PROMPT = "A patient has: weight 46.2 kg; height 188 cm; sex male. Calculate the adjusted body weight in kg."
ROW = {"answer": 67.822, "lower": 64.43, "upper": 71.21, "unit": "kg", "steps": [74.016, 82.237]}


def score(response, prompt=PROMPT, **changes):
    columns = {key: [value] for key, value in (ROW | changes).items()}
    (one,) = calculated([prompt], [response], **columns)
    return one


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("The answer is 67.8 kg.", 1.0),
        ("The answer is 64.43", 1.0),
        ("The answer is 71.22", 0.0),
        ("答案是 67.8 公斤。", 1.0),
        ("The answer is 149.5 lbs", 1.0),
        ("The answer is 67.8 cm", 0.0),
        ("188 / 2.54 = 74.02 in. 50 + 2.3 * 14.02 = 82.24 kg. The answer is 67.8 kg", 1.0),
        ("188 / 2.54 = 74.02 in. 50 + 2.3 * 14.02 = 82.24 kg. The answer is 90 kg", 0.3),
        ("188 / 2.54 = 74.02 in. 50 + 2.3 * 14.02 = 85 kg. The answer is 90 kg", 0.15),
        ("身高 = 74.02 英寸，理想体重 = 82.24 公斤。答案是 90", 0.3),
        ("It is 74.02 in and 82.24 kg. The answer is 90 kg", 0.0),
        ("= 74.1 and = 82.3. The answer is 90", 0.3),  # within half a percent
        ("= 75 and = 83. The answer is 90", 0.0),
        ("", 0.0),
        (PROMPT, 0.0),
        ("The answer is 67.8 or 90", 0.0),
        ("The answer is 90. " + " ".join(f"= {n / 10}" for n in range(600, 900)), 0.0),
        (" ".join(f"= {n}" for n in (70, 71, 72, 73, 74, 75, 80, 81, 82, 83)) + " The answer is 90", 0.3),
    ],
)
def test_golden_answers(response, expected):
    assert score(response) == pytest.approx(expected)


def test_what_the_prompt_says_is_no_step():
    assert share_of_steps("height 74 in", "= 74", [74.016]) == 0.0
    assert share_of_steps("height 188 cm", "= 74", [74.016]) == 1.0
    assert share_of_steps("", "= 74", []) == 0.0


def test_rows_without_steps_limits_or_gold():
    for none in (None, float("nan"), 74.016, "74.016", {}):
        assert score("= 74.02. The answer is 90", steps=none) == 0.0
    assert score("The answer is 70", lower=None, upper=None) == 1.0  # 5 % of 67.822
    assert score("The answer is 72", lower=None, upper=None) == 0.0
    assert score("The answer is 67", lower=None, upper=None, tolerance=0.5) == 0.0
    assert score("The answer is 70", answer=None, lower=None, upper=None) is None


def test_steps_that_are_no_numbers_are_passed_over():
    assert score("= 74 The answer is 90", steps=[float("nan"), None, "x", 74.016]) == pytest.approx(0.3)
    assert score("The answer is 90", steps="none") == 0.0


@pytest.fixture(scope="module")
def rows():
    return [r.values for held in (False, True) for r in questions(seed=0, held_out=held, rows_per_calculator=20)]


def columns_of(rows):
    return {key: [row[key] for row in rows] for key in ("answer", "lower", "upper", "unit", "steps")}


def test_the_package_s_own_solutions_score_one(rows):
    prompts, answers = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    scores = calculated(prompts, answers, **columns_of(rows))
    wrong = [(row["completion"][-60:], row["group"]) for row, one in zip(rows, scores, strict=True) if one != 1.0]
    assert wrong == []


def test_another_row_s_solution_and_echoes_do_not(rows):
    """An answer to the next question of the same calculator, and the question itself."""
    rows = sorted(rows, key=lambda row: row["group"])
    prompts = [row["prompt"] for row in rows]
    shifted = [row["completion"] for row in rows[1:] + rows[:1]]
    scores = calculated(prompts, shifted, **columns_of(rows))
    assert sum(one == 1.0 for one in scores) < 0.2 * len(rows)  # two patients may be alike
    assert sum(calculated(prompts, prompts, **columns_of(rows))) < 0.02 * len(rows)


def test_the_right_steps_with_a_wrong_ending_get_the_partial_credit(rows):
    rows = [row for row in rows if row["steps"]]
    prompts = [row["prompt"] for row in rows]
    answers = [row["completion"].replace("≈", "=") + f" The answer is {row['answer'] * 3:g}" for row in rows]
    scores = calculated(prompts, answers, **columns_of(rows))
    assert max(scores) <= 0.3
    assert sum(scores) > 0.25 * len(rows)


@pytest.mark.parametrize("response", ["= 1 " * 250_000, "=" * 1_000_000, "= 74.016, " * 100_000, "9" * 1_000_000])
def test_a_million_characters_cost_less_than_50_milliseconds(response):
    began = time.process_time()
    assert score(response) == 0.0
    assert time.process_time() - began < 0.05


def test_each_row_is_scored_by_itself(rows):
    prompts, answers = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    together = calculated(prompts, answers, **columns_of(rows))
    back = rows[::-1]
    backwards = calculated([r["prompt"] for r in back], [r["completion"] for r in back], **columns_of(back))
    assert together == backwards[::-1]

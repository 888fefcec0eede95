"""The number an answer settles on: golden tables of right, wrong and evasive answers."""

from __future__ import annotations

import numpy as np
import pytest
from patience import no_explosion

from rewards.numbers import final_number, near_number


def score(response, gold, **row):
    settings = {key: row.pop(key) for key in ("expressions", "unit_required", "relative_tolerance") if key in row}
    columns = {key: [value] for key, value in row.items()}
    (one,) = final_number(["q"], [response], answer=[gold], **columns, **settings)
    return one


RIGHT = [
    ("The answer is 24.", 24, {}),
    ("The answer is: **24**", 24, {}),
    ("So 8 * 3 = 24", 24, {}),
    ("24", 24, {}),
    ("I think it is 24", 24, {}),
    ("答案是24", 24, {}),
    ("答案：２４", 24, {}),
    ("答案为二十四。", 24, {}),
    ("二十四", 24, {}),
    ("结果是三点五毫克", "3.5 mg", {}),
    ("共需要 1.2万 元", 12000, {}),
    ("The answer is 1,234,567", 1234567, {}),
    ("The answer is 1234567.0", "1,234,567", {}),
    ("The answer is 3/4.", "3/4", {}),
    ("The answer is 0.75", "3/4", {}),
    ("The answer is ¾.", 0.75, {}),
    ("It takes 3 1/2 hours", 3.5, {}),
    ("It takes 3½ hours", 3.5, {}),
    ("The answer is 1.5e-3", 0.0015, {}),
    ("The answer is 1.5 × 10⁻³", 0.0015, {}),
    ("The answer is 1.5 x 10^-3 g".replace(" x ", " × "), "1.5 mg", {}),
    (r"\boxed{42}", 42, {}),
    (r"So we get $\boxed{\frac{3}{4}}$.", 0.75, {}),
    (r"$\boxed{3.2\text{ mg/dL}}$", "3.2 mg/dL", {}),
    (r"\boxed{1.5 \times 10^{-3}}", 0.0015, {}),
    ("creatinine = 3.2 mg/dL", "3.2 mg/dL", {}),
    ("The answer is 3.2 mg/dL (normal 0.6-1.2).", "3.2 mg/dL", {}),
    ("BMI = 70 / (1.75 * 1.75) = 22.86 kg/m^2", 22.86, {"tolerance": 0.01}),
    ("BMI = 70 / 1.75² = 22.857 kg/m²", "22.857 kg/m^2", {}),
    ("The answer is 23.", 22.86, {"lower": 21.7, "upper": 24.0}),
    ("The answer is 21.7", 22.86, {"lower": 21.7, "upper": 24.0}),
    ("The answer is 500 mg", "0.5 g", {}),
    ("答案是500毫克", "0.5 g", {}),
    ("The dose is 250 mcg", 0.25, {"unit": "mg"}),
    ("The weight is 154.324 lb", "70 kg", {}),
    ("体重是140斤", "70 kg", {}),
    ("The answer is 0.5", 0.5, {"unit": "mg"}),
    ("The answer is 2 tablets", 2, {"unit": "mg"}),
    ("The answer is -4", -4, {}),
    ("The answer is −4", -4, {}),
    ("The answer is 50%", "50%", {}),
    ("The answer is 50 percent", "50%", {}),
    ("The answer is 50", "50%", {}),
    ("The answer is 0", 0, {}),
    ("<think>1, 2 or 3? The answer is 7.</think>The answer is 24.", 24, {}),
    ("<think>hm</think><answer>24</answer>", 24, {}),
    ("The answer is 24. So the answer is 24.0", 24, {}),
    ("The answer is about 24", 24, {}),
    ("The temperature is 98.6 °F", "37 °C", {}),
    ("#### 24", 24, {}),
    ("The patient took 3 pills for 8 days. 3 * 8 = 24 pills.", 24, {}),
    ("The answer is approximately 3.14", 3.14159, {"relative_tolerance": 0.01}),
    ("The answer is 12 * 2", 24, {"expressions": True}),
    ("The answer is 2^3 * 3", 24, {"expressions": True}),
    ("The answer is $24", 24, {}),
    ("约为24次/分", "24 次/分钟", {}),
    ("**24**", 24, {}),
    ("The total is **24**.", 24, {}),
    ("So **24** apples", 24, {}),
    ("The answer is **24** (rounded)", 24, {}),
    ("Steps:\n* 24", 24, {}),
    (r"The answer is \(24\).", 24, {}),
    (r"\boxed{1{,}234}", 1234, {}),
    (r"\boxed{\frac34}", 0.75, {}),
    (r"\boxed{3\frac{1}{2}}", 3.5, {}),
    (r"\boxed{10^{-3}}", 0.001, {}),
    ("The answer is 10⁵", 100_000, {}),
    ("The answer is 1.5 x 10^-3", 0.0015, {}),
    ("The answer is 3.5 million", 3_500_000, {}),
    ("The answer is 75%", 0.75, {}),
    ("The answer is 75%", 75, {}),
    ("答案是百分之七十五", "75%", {}),
    ("负5", -5, {}),
    ("The answer is 24, not 25", 24, {}),
    ("<answer>24</answer> <answer> 24 </answer>", 24, {}),
]

WRONG = [
    ("The answer is 25.", 24, {}),
    ("", 24, {}),
    ("no idea", 24, {}),
    ("The answer is unknown", 24, {}),
    ("The answer is 2 or 24", 24, {}),
    ("The answer is 24 or 2", 24, {}),
    ("The answer is 20-30", 20, {}),
    ("The answer is 20 - 30", 20, {}),
    ("The answer is between 23 and 24", 24, {}),
    ("The answer is 23 to 24", 23, {}),
    ("答案是23或24", 23, {}),
    ("答案是23到24", 23, {}),
    ("答案是23、24", 23, {}),
    ("It is 1, 2, 3, 24", 24, {}),
    ("1 2 3 4 5 6 or 24", 24, {}),
    ("The answer is 24. The answer is 25.", 24, {}),
    ("The answer is 25. The answer is 24.", 24, {}),
    (" ".join(f"The answer is {n}." for n in range(100)), 24, {}),
    (" ".join(f"\\boxed{{{n}}}" for n in range(100)), 24, {}),
    ("The answer is " + ", ".join(map(str, range(100))), 0, {}),
    ("The answer is 12 * 2", 24, {}),
    ("The answer is 12 + 12", 12, {}),
    ("The answer is 70/1.75", 70, {}),
    ("The answer is 10**10**10", 10, {"expressions": True}),
    ("The answer is 9^9^9^9", 9, {"expressions": True}),
    ("The answer is 1e999999999", 1, {}),
    ("The answer is 24 mL", "24 mg", {}),
    ("The answer is 24 g", "24 mg", {}),
    ("The answer is 24 mmol/L", "24 mg/dL", {}),
    ("The answer is 24", "24 mg", {"unit_required": True}),
    ("The answer is 24 tablets", "24 mg", {"unit_required": True}),
    ("The answer is 0.5", "50%", {}),
    ("The answer is 24.1", 24, {"tolerance": 0.05}),
    ("The answer is 21.6", 22.86, {"lower": 21.7, "upper": 24.0}),
    ("The answer is 124", 24, {}),
    ("The answer is 2.4", 24, {}),
    ("The answer is -24", 24, {}),
    ("24 <think> is it?", 24, {}),
    ("<think>The answer is 24.</think>", 24, {}),
    ("<think>The answer is 24.", 24, {}),
    ("The answer is nan", 24, {}),
    ("The answer is inf", 24, {}),
    ("The answer is ٢٤x", 25, {}),
    ("答案是二十五", 24, {}),
    ("The answer is 1,24", 24, {}),
    ("version a24", 24, {}),
    ("The answer is 24. The answer is 24 or 25.", 24, {}),
    ("The answer is 25. " + "The answer is 24. " * 10, 24, {}),
    ("The answer is 24, or 25", 24, {}),
    ("The answer is 24 (or 25)", 24, {}),
    ("The answer is 24 or maybe 25", 24, {}),
    ("答案是24或者25", 24, {}),
    ("答案是24还是25", 24, {}),
    ("答案是五或六", 5, {}),
    ("The answer is not 24", 24, {}),
    ("答案不是24", 24, {}),
    ("The answer is less than 24", 24, {}),
    ("The answer is 24 million", 24, {}),
    (r"\boxed{\sqrt{24}}", 24, {}),
    (r"\boxed{24\sqrt{3}}", 24, {}),
    (r"\boxed{24\pi}", 24, {}),
    (r"\boxed{24^{2}}", 24, {}),
    (r"\boxed{24x}", 24, {}),
    (r"\boxed{24 + x}", 24, {}),
    (r"\boxed{3\frac{1}{2}}", "31/2", {}),
    ("x = 2 * 24", 24, {}),
    ("weight * 24", 24, {}),
    ("<answer>25</answer><answer>24</answer>", 24, {}),
    ("<think>The answer is 24. " + "so " * 10_000 + "The answer is 24.", 24, {}),
    ("<think>hm</think><think>The answer is 24.", 24, {}),
]


@pytest.mark.parametrize(("response", "gold", "row"), RIGHT)
def test_right_answers_score_one(response, gold, row):
    assert score(response, gold, **dict(row)) == 1.0


@pytest.mark.parametrize(("response", "gold", "row"), WRONG)
def test_wrong_and_evasive_answers_score_zero(response, gold, row):
    assert score(response, gold, **dict(row)) == 0.0


@pytest.mark.parametrize("gold", [None, "", "none", float("nan"), float("inf"), True, [1], {}])
def test_a_row_without_a_number_is_not_scored(gold):
    assert score("The answer is 1", 1) == 1.0  # an equal key must not answer for this one
    assert score("The answer is 1", gold) is None


@pytest.mark.parametrize(
    "gold", ["1+4", "10-20", "5 or 6", "1, 2", "2026-11-22", r"2\sqrt{3}", "3x + 1", "5x", "12:30"]
)
def test_a_gold_of_several_numbers_or_of_arithmetic_is_none(gold):
    assert score(f"The answer is {gold}", gold) is None


def test_limits_that_nothing_meets_are_no_gold():
    assert score("The answer is 5", 5, lower=6, upper=4) is None


def test_a_gold_may_be_a_number_of_numpy():
    assert score("The answer is 5", np.int64(5)) == score("The answer is 5", np.float32(5)) == 1.0


def test_limits_alone_are_a_gold():
    assert score("The answer is 5", None, lower=1) == 1.0
    assert score("The answer is 5", None, upper=4) == 0.0


def test_golds_may_be_text_with_its_own_words():
    assert score("The answer is 24", "24 (rounded)") == 1.0
    assert score("The answer is 23", "二十三") == 1.0


@pytest.mark.parametrize(
    "response",
    [
        "1 " * 500_000,
        "The answer is " * 70_000,
        "9" * 1_000_000,
        "1," * 500_000,
        "=" * 1_000_000,
        "一" * 1_000_000,
        "\\boxed{" * 140_000,
        "<answer>" * 120_000,
        "１" * 1_000_000,
        "\\frac{" * 170_000,
        "- " * 500_000,
    ],
    ids=lambda text: repr(text[:14]),
)
def test_a_million_characters_do_not_explode(response):
    with no_explosion():
        assert score(response, 24) == 0.0


def test_each_row_is_scored_by_itself():
    rows = [(r, g, row) for r, g, row in [*RIGHT, *WRONG] if not row]
    together = final_number(["q"] * len(rows), [r for r, _, _ in rows], answer=[g for _, g, _ in rows])
    backwards = final_number(["q"] * len(rows), [r for r, _, _ in rows][::-1], answer=[g for _, g, _ in rows][::-1])
    assert together == backwards[::-1] == [score(r, g) for r, g, _ in rows]


def nearness(response, gold, **settings):
    columns = {name: [settings.pop(name)] for name in ("unit",) if name in settings}
    (one,) = near_number(["q"], [response], answer=[gold], **columns, **settings)
    return one


@pytest.mark.parametrize(
    ("response", "gold", "expected"),
    [
        ("The answer is 100", 100, 1.0),
        ("The answer is 105", 100, 0.8),
        ("The answer is 90", 100, 0.6),
        ("答案是 87.5", 100, 0.5),
        ("The answer is 125", 100, 0.0),
        ("The answer is 1e9", 100, 0.0),
        ("The answer is -95", -100, 0.8),
        ("The answer is 0", 0, 1.0),
        ("The answer is 0.001", 0, 0.0),
        ("I do not know", 100, 0.0),
        ("The answer is 100 or 110", 100, 0.0),
        ("The answer is 100. The answer is 110.", 100, 0.6),
        ("10**10**10 = the answer is 10**10**10", 100, 0.0),
    ],
)
def test_nearness_falls_in_proportion_to_the_distance(response, gold, expected):
    assert nearness(response, gold) == pytest.approx(expected)


def test_nearness_is_taken_in_the_unit_of_the_row():
    assert nearness("The answer is 1.9 g", 2000, unit="mg") == pytest.approx(0.8)
    assert nearness("The answer is 1900 mg", "2 g") == pytest.approx(0.8)
    assert nearness("The answer is 2000 m", 2000, unit="mg") == 0.0


def test_nearness_by_another_reach_and_without_a_gold():
    assert nearness("The answer is 105", 100, reach=0.1) == pytest.approx(0.5)
    assert nearness("The answer is 105", None) is None
    assert nearness("The answer is 105", ["100"]) is None
    with pytest.raises(ValueError, match="reach: got 0, expected a number above 0"):
        nearness("The answer is 105", 100, reach=0)

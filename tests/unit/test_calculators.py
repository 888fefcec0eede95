"""Questions of medical calculators: every value against a formula of our own, rows that follow from a seed."""

from __future__ import annotations

import math

import pytest

from alignment.config import SourceConfig
from alignment.data import calculators
from alignment.data.calculators import CALCULATORS, compute, is_held_out, questions
from alignment.data.sources import read_rows


def inches(height):
    return height / 2.54


def ideal(height, sex):
    return (50.0 if sex == "Male" else 45.5) + 2.3 * (inches(height) - 60)


def gap(sodium, chloride, bicarbonate):
    return sodium - chloride - bicarbonate


def corrected_gap(sodium, chloride, bicarbonate, albumin):
    return gap(sodium, chloride, bicarbonate) + 2.5 * (4 - albumin)


def deficit(age, sex, weight, sodium):
    share = {("Male", False): 0.6, ("Female", False): 0.5, ("Male", True): 0.5, ("Female", True): 0.45}
    return share[sex, age >= 65] * weight * (sodium / 140 - 1)


def ckd_epi(age, sex, creatinine):
    kappa, alpha, factor = (0.9, -0.302, 1.0) if sex == "Male" else (0.7, -0.241, 1.012)
    ratio = creatinine / kappa
    return 142 * min(ratio, 1) ** alpha * max(ratio, 1) ** -1.2 * 0.9938**age * factor


OURS = {
    "bmi": lambda weight, height: weight / (height / 100) ** 2,
    "bsa": lambda weight, height: math.sqrt(weight * height / 3600),
    "ideal-weight": ideal,
    "adjusted-weight": lambda weight, height, sex: 0.6 * ideal(height, sex) + 0.4 * weight,
    "mean-arterial-pressure": lambda sys_bp, dia_bp: dia_bp + (sys_bp - dia_bp) / 3,
    "anion-gap": gap,
    "delta-gap": lambda *given: gap(*given) - 12,
    "corrected-anion-gap": corrected_gap,
    "corrected-delta-gap": lambda *given: corrected_gap(*given) - 12,
    "corrected-calcium": lambda calcium, albumin: calcium + 0.8 * (4 - albumin),
    "corrected-sodium": lambda sodium, glucose: sodium + 2.4 * (glucose - 100) / 100,
    "osmolality": lambda sodium, bun, glucose: 2 * sodium + bun / 2.8 + glucose / 18,
    "fractional-sodium": lambda sodium, creatinine, urine_sodium, urine_creatinine: (
        100 * (urine_sodium / sodium) / (urine_creatinine / creatinine)
    ),
    "water-deficit": deficit,
    "ldl": lambda total, hdl, triglycerides: total - hdl - triglycerides / 5,
    "mdrd": lambda age, sex, creatinine: 175 * creatinine**-1.154 * age**-0.203 * (1.0 if sex == "Male" else 0.742),
    "ckd-epi": ckd_epi,
    "fib-4": lambda age, ast, alt, platelets: age * ast / (platelets / 1000 * math.sqrt(alt)),
    "homa-ir": lambda insulin, glucose: insulin * glucose / 405,
    "qtc-bazett": lambda qt, rate: qt / math.sqrt(60 / rate),
    "qtc-hodges": lambda qt, rate: qt + 1.75 * (rate - 60),
    "qtc-rautaharju": lambda qt, rate: qt * (120 + rate) / 180,
}


@pytest.fixture(scope="module")
def rows():
    return [row.values for held_out in (False, True) for row in questions(seed=3, held_out=held_out)]


def test_every_calculator_is_checked_against_ours():
    assert set(OURS) == set(CALCULATORS)


@pytest.mark.parametrize("name", CALCULATORS)
def test_values_equal_our_own_formula(name, monkeypatch):
    """Rounding on the way moves the package's values by at most 1 in 1,000; limits are 5 %."""
    seen = []

    def recorded(which, inputs):
        value, explanation = compute(which, inputs)
        seen.append((value, inputs))
        return value, explanation

    monkeypatch.setattr(calculators, "compute", recorded)
    monkeypatch.setattr(calculators, "CALCULATORS", {name: CALCULATORS[name]})
    assert len(list(questions(seed=1, held_out=is_held_out(name)))) == 100
    asked = [(value, inputs) for value, inputs in seen if value >= calculators.SMALLEST]
    assert len(asked) == 100
    for value, inputs in asked:
        assert value == pytest.approx(OURS[name](*inputs.values()), rel=2e-3, abs=0.02), inputs


def test_rows_follow_from_the_seed(rows):
    again = [row.values for held_out in (False, True) for row in questions(seed=3, held_out=held_out)]
    assert rows == again
    other = [row.values for row in questions(seed=4, held_out=False)]
    assert all(a["prompt"] != b["prompt"] for a, b in zip(rows[:50], other[:50], strict=True))
    few = [row.values for row in questions(seed=3, held_out=False, rows_per_calculator=2)]
    assert few == rows[: len(few)]


def test_the_split_is_by_calculator(rows):
    train = {row.values["group"] for row in read_rows(SourceConfig(asset="medical-calculators"))}
    held_out = {row.values["group"] for row in read_rows(SourceConfig(asset="medical-calculators-held-out"))}
    assert train | held_out == set(CALCULATORS)
    assert not train & held_out
    assert len(held_out) >= 3
    assert {row["group"] for row in rows} == set(CALCULATORS)


def test_rows_hold_together(rows):
    for row in rows:
        assert row["lower"] < row["answer"] < row["upper"]
        assert row["upper"] - row["lower"] == pytest.approx(0.1 * abs(row["answer"]), rel=1e-3)
        assert row["answer"] >= 0.1
        assert row["answer"] not in row["steps"]
        ending = "答案是" if "病人" in row["prompt"] else "The answer is"
        assert row["completion"].partition(ending)[2].split()[0].rstrip(".。") == f"{row['answer']:g}"
    assert len({row["prompt"] for row in rows}) > 0.95 * len(rows)
    chinese = [row for row in rows if "病人" in row["prompt"]]
    assert len(chinese) == len(rows) / 2


def test_golden_rows():
    value, explanation = compute("bmi", {"weight": 70, "height": 175})
    assert value == 22.857
    assert "= 22.857 kg/m^2" in explanation
    assert compute("ideal-weight", {"height": 180, "sex": "Female"})[0] == pytest.approx(70.49, abs=0.01)


def test_steps_are_results_and_no_operands():
    rows = [row.values for row in questions(seed=0, held_out=is_held_out("adjusted-weight"), rows_per_calculator=4)]
    for row in (row for row in rows if row["group"] == "adjusted-weight"):
        height_in, ideal_weight = row["steps"]
        assert 59 < height_in < 77
        assert ideal_weight == pytest.approx((row["answer"] - 0.4 * weight_of(row["prompt"])) / 0.6, abs=0.01)


def weight_of(prompt):
    words = prompt.replace("；", " ").replace("：", " ").replace(";", " ").split()
    return float(words[words.index("kg") - 1])

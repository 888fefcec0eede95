"""Questions whose answer a medical calculator knows: seeded numbers, worked steps, limits, in English and Chinese.

The calculators are those of a package (medcalc-bench) that is fetched and checked by hash like every asset, and
imported from the cache without being installed; they need the standard library alone. Offered here are the ones whose
value, in the ranges asked for, equals a formula of our own in the tests. Left out are those that are wrong (the target
weight fails; CKD-EPI below 0.9 mg/dL for men), whose steps show another formula than they compute (QTc by Framingham
and Fridericia, maintenance fluids), and sums of points, which ask for reading more than for arithmetic.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from alignment.data.assets import fetch_asset
from alignment.data.files import Row

ROWS_PER_CALCULATOR = 100
HELD_OUT_OF = 4
"""One in so many calculators, by a hash of its name, is kept for the evaluation."""
MARGIN = 0.05
"""Of the value, on either side: what MedCalc-Bench (Khandekar et al. 2024) accepts for an equation."""
SMALLEST = 0.1
"""Of a value: nearer to 0 a relative margin is of no use, and below it the package rounds to three digits. Other
numbers are drawn then."""

_PACKAGE = "_raylign_medcalc"
_RESULT = re.compile(r"=\s*(-?\d+(?:\.\d+)?)(?:\s[A-Za-zµ%/^\d]+){0,2}(?=[.,](?:\s|[A-Z]|$))")
"""A value behind an equals sign with at most a unit behind it: no operand of what follows."""

INPUTS: dict[str, tuple[str, str, str, float, float, int]] = {
    "weight": ("weight", "体重", "kg", 45, 120, 1),
    "height": ("height", "身高", "cm", 150, 195, 0),
    "sys_bp": ("systolic blood pressure", "收缩压", "mmHg", 95, 180, 0),
    "dia_bp": ("diastolic blood pressure", "舒张压", "mmHg", 50, 94, 0),
    "sodium": ("serum sodium", "血钠", "mEq/L", 128, 158, 0),
    "chloride": ("serum chloride", "血氯", "mEq/L", 92, 112, 0),
    "bicarbonate": ("serum bicarbonate", "血碳酸氢根", "mEq/L", 10, 30, 0),
    "albumin": ("serum albumin", "血清白蛋白", "g/dL", 1.8, 4.8, 1),
    "calcium": ("serum calcium", "血钙", "mg/dL", 7, 12, 1),
    "glucose": ("blood glucose", "血糖", "mg/dL", 80, 480, 0),
    "bun": ("blood urea nitrogen", "血尿素氮", "mg/dL", 6, 60, 0),
    "creatinine": ("serum creatinine", "血肌酐", "mg/dL", 1.0, 4.5, 1),
    "urine_sodium": ("urine sodium", "尿钠", "mEq/L", 10, 90, 0),
    "urine_creatinine": ("urine creatinine", "尿肌酐", "mg/dL", 20, 150, 0),
    "total_cholestrol": ("total cholesterol", "总胆固醇", "mg/dL", 150, 290, 0),
    "hdl_cholestrol": ("HDL cholesterol", "高密度脂蛋白胆固醇", "mg/dL", 30, 75, 0),
    "triglycerides": ("triglycerides", "甘油三酯", "mg/dL", 60, 300, 0),
    "heart_rate": ("heart rate", "心率", "beats/min", 50, 120, 0),
    "qt_interval": ("QT interval", "QT间期", "msec", 320, 460, 0),
    "age": ("age", "年龄", "years", 20, 85, 0),
    "ast": ("AST", "谷草转氨酶", "U/L", 15, 150, 0),
    "alt": ("ALT", "谷丙转氨酶", "U/L", 15, 150, 0),
    "platelet_count": ("platelet count per µL", "血小板计数（每µL）", "µL", 60_000, 400_000, -3),
    "insulin": ("fasting insulin", "空腹胰岛素", "µIU/mL", 2, 40, 1),
}
"""Name in English and Chinese, unit, lowest and highest value, decimals; `sex` is drawn apart. The keys' spelling is
the package's."""


@dataclass(frozen=True, slots=True)
class Calculator:
    """One of the package's functions and what is asked of it."""

    module: str
    function: str
    english: str
    chinese: str
    unit: str
    inputs: tuple[str, ...]


def _listed(*rows: tuple[str, str, str, str, str, str, str]) -> dict[str, Calculator]:
    return {name: Calculator(m, f, en, zh, unit, tuple(inputs.split())) for name, m, f, en, zh, unit, inputs in rows}


_GAP = "sodium chloride bicarbonate"
CALCULATORS = _listed(
    ("bmi", "bmi_calculator", "bmi_calculator_explanation", "body mass index", "体重指数", "kg/m^2", "weight height"),
    ("bsa", "bsa_calculator", "bsa_calculator_explaination", "body surface area by Mosteller's formula",
     "体表面积（Mosteller公式）", "m^2", "weight height"),
    ("ideal-weight", "ideal_body_weight", "ibw_explanation", "ideal body weight by Devine's formula",
     "理想体重（Devine公式）", "kg", "height sex"),
    ("adjusted-weight", "adjusted_body_weight", "abw_explanation", "adjusted body weight", "校正体重", "kg",
     "weight height sex"),
    ("mean-arterial-pressure", "mean_arterial_pressure", "mean_arterial_pressure_explanation",
     "mean arterial pressure", "平均动脉压", "mmHg", "sys_bp dia_bp"),
    ("anion-gap", "anion_gap", "compute_anion_gap_explanation", "anion gap", "阴离子间隙", "mEq/L", _GAP),
    ("delta-gap", "delta_gap", "compute_delta_gap_explanation", "delta gap (anion gap above 12)",
     "阴离子间隙差值（阴离子间隙减12）", "mEq/L", _GAP),
    ("corrected-anion-gap", "albumin_corrected_anion", "compute_albumin_corrected_anion_explanation",
     "albumin-corrected anion gap", "白蛋白校正阴离子间隙", "mEq/L", f"{_GAP} albumin"),
    ("corrected-delta-gap", "albumin_corrected_delta_gap", "compute_albumin_corrected_delta_gap_explanation",
     "albumin-corrected delta gap", "白蛋白校正阴离子间隙差值", "mEq/L", f"{_GAP} albumin"),
    ("corrected-calcium", "calcium_correction", "calculate_corrected_calcium_explanation",
     "albumin-corrected calcium", "白蛋白校正血钙", "mg/dL", "calcium albumin"),
    ("corrected-sodium", "sch", "compute_sodium_correction_hyperglycemia_explanation",
     "sodium corrected for hyperglycaemia (2.4 mEq/L per 100 mg/dL)", "高血糖校正血钠（每100 mg/dL校正2.4 mEq/L）",
     "mEq/L", "sodium glucose"),
    ("osmolality", "sOsm", "compute_serum_osmolality_explanation", "serum osmolality", "血清渗透压", "mOsm/kg",
     "sodium bun glucose"),
    ("fractional-sodium", "compute_fena", "compute_fena_explanation", "fractional excretion of sodium",
     "钠排泄分数", "%", "sodium creatinine urine_sodium urine_creatinine"),
    ("water-deficit", "free_water_deficit", "free_water_deficit_explanation", "free water deficit", "自由水缺失量",
     "L", "age sex weight sodium"),
    ("ldl", "ldl_calculated", "compute_ldl_explanation", "LDL cholesterol by Friedewald's formula",
     "低密度脂蛋白胆固醇（Friedewald公式）", "mg/dL", "total_cholestrol hdl_cholestrol triglycerides"),
    ("mdrd", "mdrd_gfr", "mrdr_gfr_explanation", "glomerular filtration rate by the MDRD equation",
     "肾小球滤过率（MDRD公式）", "mL/min per 1.73 m²", "age sex creatinine"),
    ("ckd-epi", "ckd_epi_2021_creatinine", "ckd_epi_2021_explanation",
     "glomerular filtration rate by the CKD-EPI 2021 creatinine equation", "肾小球滤过率（CKD-EPI 2021公式）",
     "mL/min per 1.73 m²", "age sex creatinine"),
    ("fib-4", "fibrosis_4", "compute_fib4_explanation", "FIB-4 index", "FIB-4指数", "", "age ast alt platelet_count"),
    ("homa-ir", "homa_ir", "compute_homa_ir_explanation", "HOMA-IR index", "HOMA-IR指数", "", "insulin glucose"),
    ("qtc-bazett", "qt_calculator_bazett", "bazett_calculator_explanation", "QTc by Bazett's formula",
     "QTc（Bazett公式）", "msec", "qt_interval heart_rate"),
    ("qtc-hodges", "qt_calculator_hodges", "hodges_calculator_explanation", "QTc by Hodges's formula",
     "QTc（Hodges公式）", "msec", "qt_interval heart_rate"),
    ("qtc-rautaharju", "qt_calculator_rautaharju", "rautaharju_calculator_explanation",
     "QTc by Rautaharju's formula QT x (120 + heart rate) / 180", "QTc（Rautaharju公式：QT x (120 + 心率) / 180）",
     "msec", "qt_interval heart_rate"),
)  # fmt: skip
"""By the name that is the rows' group."""


def calculator_rows() -> Iterator[Row]:
    """Rows of the calculators to train on."""
    yield from questions(seed=0, held_out=False)


def held_out_calculator_rows() -> Iterator[Row]:
    """Rows of the calculators that are kept for the evaluation."""
    yield from questions(seed=0, held_out=True)


def questions(*, seed: int, held_out: bool, rows_per_calculator: int = ROWS_PER_CALCULATOR) -> Iterator[Row]:
    """Rows with `prompt`, `answer`, `lower`, `upper`, `unit`, `steps`, `completion` and `group`, the calculator.

    A row depends on the seed, its calculator and its number alone. Calculators take turns.

    Args:
        held_out: which of the two halves of the split by calculator.
    """
    names = [name for name in CALCULATORS if is_held_out(name) == held_out]
    for index in range(rows_per_calculator):
        for name in names:
            yield Row(_question(name, seed, index), f"medical-calculators:{name}:{index}")


def is_held_out(name: str) -> bool:
    return int(hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest(), 16) % HELD_OUT_OF == 0


def compute(name: str, inputs: dict[str, Any]) -> tuple[float, str]:
    """What the package's calculator gives: its value, and its explanation.

    Args:
        inputs: by key a number in the unit of INPUTS; `sex` "Male" or "Female".
    """
    given = {key: value if key == "sex" else (value, INPUTS[key][2]) for key, value in inputs.items()}
    found = _function(name)(given)
    return float(found["Answer"]), " ".join(found["Explanation"].split())


def _question(name: str, seed: int, index: int) -> dict[str, Any]:
    rng = random.Random(f"{seed}:{name}:{index}")
    value = 0.0
    while value < SMALLEST:
        inputs = {key: _draw(key, rng) for key in CALCULATORS[name].inputs}
        value, explanation = compute(name, inputs)
    chinese = index % 2 == 1
    calculator, prompt = CALCULATORS[name], _prompt(name, inputs, chinese)
    ending = f"答案是 {value:g}" if chinese else f"The answer is {value:g}"
    return {
        "prompt": prompt,
        "answer": value,
        "lower": round(value * (1 - MARGIN), 6),
        "upper": round(value * (1 + MARGIN), 6),
        # Milliequivalents and millimoles of these ions are the same number: neither is a wrong unit.
        "unit": None if "mEq" in calculator.unit else calculator.unit,
        "steps": _steps(explanation, value, inputs),
        "completion": f"{explanation} {ending} {calculator.unit}".strip() + ("。" if chinese else "."),
        "group": name,
    }


def _draw(key: str, rng: random.Random) -> Any:
    if key == "sex":
        return rng.choice(("Male", "Female"))
    _, _, _, low, high, decimals = INPUTS[key]
    value = round(rng.uniform(low, high), decimals)
    return value if decimals > 0 else int(value)


def _prompt(name: str, inputs: dict[str, Any], chinese: bool) -> str:
    calculator = CALCULATORS[name]
    told = []
    for key, value in inputs.items():
        if key == "sex":
            told.append(f"性别 {'男' if value == 'Male' else '女'}" if chinese else f"sex {value.lower()}")
            continue
        english, zh, unit, *_ = INPUTS[key]
        unit = {"platelet_count": "", "age": "岁" if chinese else "years"}.get(key, unit)
        told.append(f"{zh if chinese else english} {value} {unit}".strip())
    unit = calculator.unit
    if chinese:
        asked = f"，单位为 {unit}" if unit else ""
        return f"病人资料：{'；'.join(told)}。请计算{calculator.chinese}{asked}。写出步骤，最后一句写“答案是”和数值。"
    asked = f" in {unit}" if unit else ""
    return (
        f"A patient has: {'; '.join(told)}. Calculate the {calculator.english}{asked}. "
        'Show the steps and end with "The answer is" and the number.'
    )


def _steps(explanation: str, value: float, inputs: dict[str, Any]) -> list[float]:
    """Values behind an equals sign, in order, other than the answer and what was given."""
    steps: list[float] = []
    for found in _RESULT.findall(explanation):
        step = float(found)
        if step != value and step not in steps and step not in inputs.values():
            steps.append(step)
    return steps


@lru_cache(maxsize=1)
def _package() -> str:
    folder = fetch_asset("medcalc")
    spec = importlib.util.spec_from_file_location(
        _PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[_PACKAGE] = module
    spec.loader.exec_module(module)
    return _PACKAGE


def _function(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    calculator = CALCULATORS[name]
    function: Callable[[dict[str, Any]], dict[str, Any]] = getattr(
        importlib.import_module(f"{_package()}.{calculator.module}"), calculator.function
    )
    return function

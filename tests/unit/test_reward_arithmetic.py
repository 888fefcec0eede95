"""Our arithmetic against exact fractions, its limits, and the units."""

from __future__ import annotations

import random
import time
from fractions import Fraction

import pytest

from rewards.arithmetic import MAX_CHARS, NotArithmetic, evaluate
from rewards.quantities import chinese_number
from rewards.units import convert, unit


def random_expression(rng: random.Random, depth: int) -> tuple[str, Fraction]:
    """An expression with every part in parentheses or not, and its exact value, built side by side."""
    if depth == 0 or rng.random() < 0.2:
        whole, digits = rng.randint(0, 999), rng.randint(0, 3)
        text = f"{whole}.{'7' * digits}" if digits else str(whole)
        return text, Fraction(text)
    sign = rng.choice("+-*/^")
    left, a = random_expression(rng, depth - 1)
    if sign == "^":
        power = rng.randint(-3, 4)
        if not a:
            power = abs(power)
        return f"({left})^({power})", a**power
    right, b = random_expression(rng, depth - 1)
    if sign == "/" and not b:
        sign = "+"
    space = rng.choice(["", " "])
    value = {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "/": lambda: a / b}[sign]()
    return f"({left}){space}{sign}{space}({right})", value


@pytest.mark.parametrize("seed", range(300))
def test_random_expressions_have_their_exact_value(seed):
    text, value = random_expression(random.Random(seed), depth=3)
    if len(text) > MAX_CHARS:
        with pytest.raises(NotArithmetic):
            evaluate(text)
    else:
        assert evaluate(text) == value


@pytest.mark.parametrize("seed", range(100))
def test_precedence_without_parentheses(seed):
    """Sums of products of signed numbers, whose value is known term by term."""
    rng = random.Random(seed)
    terms, total = [], Fraction(0)
    for index in range(rng.randint(1, 6)):
        factors = [rng.randint(1, 50) for _ in range(rng.randint(1, 3))]
        signs = [rng.choice("*/") for _ in factors[1:]]
        value = Fraction(factors[0])
        for sign, factor in zip(signs, factors[1:], strict=True):
            value = value * factor if sign == "*" else value / factor
        plus = rng.choice("+-") if index else ""
        terms.append(plus + str(factors[0]) + "".join(s + str(f) for s, f in zip(signs, factors[1:], strict=True)))
        total += -value if plus == "-" else value
    assert evaluate("".join(terms)) == total


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-2^2", -4),
        ("(-2)^2", 4),
        ("2^3^2", 512),
        ("2**-1", Fraction(1, 2)),
        ("2^-1*4", 2),
        ("8/4/2", 1),
        ("8-4-2", 2),
        ("1,234,567.5", Fraction("1234567.5")),
        ("1.5e-3", Fraction("0.0015")),
        (".5 + 1.", Fraction(3, 2)),
        ("--3", 3),
        ("((((1))))", 1),
    ],
)
def test_golden_values(text, value):
    assert evaluate(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "10**10**10",
        "9^9^9^9",
        "((2^256)^256)^256",
        "1e999999999",
        "1e-99999",
        "2^0.5",
        "2^10000",
        "1^257",
        "1/0",
        "0^-1",
        "1/(3-3)",
        "(" * 100 + "1" + ")" * 100,
        "(" * 100,
        "1+" * 150 + "1",
        "9" * 100,
        "^2",
        "2^^2",
        "1 2",
        "1,23",
        "",
        "()",
        "2x",
        "__import__('os').system('id')",
        "1j",
        "0x10",
        "1_000",
        "lambda: 1",
        "2**" * 60 + "2",
        "(1/3)^256*(1/3)^256*(1/7)^256*(1/11)^256*(1/13)^256*(1/17)^256",
    ],
)
def test_what_is_no_arithmetic_or_too_large_is_refused_at_once(text):
    began = time.process_time()
    with pytest.raises(NotArithmetic):
        evaluate(text)
    assert time.process_time() - began < 0.05


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("二十三", 23),
        ("十", 10),
        ("十五", 15),
        ("一百零五", 105),
        ("一百二十", 120),
        ("两千三百", 2300),
        ("一万二千", 12000),
        ("三亿零五万", 300050000),
        ("三点一四", Fraction("3.14")),
        ("百分之五", Fraction(1, 20)),
        ("负三", -3),
        ("二〇二六", 2026),
        ("零", 0),
        ("点五", None),
        ("三点", None),
        ("三点十", None),
        ("", None),
        ("好", None),
    ],
)
def test_chinese_numerals(text, value):
    assert chinese_number(text) == value


@pytest.mark.parametrize(
    ("value", "source", "target", "expected"),
    [
        ("1", "g", "mg", "1000"),
        ("250", "mcg", "mg", "0.25"),
        ("1", "lb", "kg", "0.45359237"),
        ("1", "in", "cm", "2.54"),
        ("5", "mmol/L", "μmol/mL", "5"),
        ("100", "mg/dL", "g/L", "1"),
        ("60", "mL/min", "L/h", "3.6"),
        ("10", "mg/kg/day", "mg/kg/h", "5/12"),
        ("25", "kg/m^2", "g/cm^2", "2.5"),
        ("98.6", "°F", "°C", "37"),
        ("37", "°C", "°F", "98.6"),
        ("50", "%", "1", "0.5"),
        ("2", "毫克/天", "mg/day", "2"),
        ("70", "bpm", "次/分钟", "70"),
        ("3", "公斤", "g", "3000"),
        ("120", "mmHg", "kPa", "15.99864"),
    ],
)
def test_units_convert(value, source, target, expected):
    assert convert(Fraction(value), unit(source), unit(target)) == Fraction(expected)


def test_units_of_another_kind_do_not():
    assert convert(Fraction(1), unit("mg"), unit("mL")) is None
    assert convert(Fraction(1), unit("mmol/L"), unit("mg/dL")) is None
    assert [unit(name) for name in ("tablets", "", "mg//L", "x" * 100, "/")] == [None] * 5

"""Numbers in text: separators, fractions, powers of ten, Chinese numerals, units, and the one an answer settles on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from rewards.arithmetic import NotArithmetic, evaluate, number
from rewards.units import MAX_UNIT, unit

_DIGITS = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d])|\d+(?:\.\d+)?|\.\d+"
_UNIT_TEXT = (
    r"(?:%|‰|°\s?[CF]|[A-Za-zμ℃℉][A-Za-zμ0-9^]*(?:/[A-Za-zμ][A-Za-zμ0-9^]*)*"
    r"|[\u4e00-\u9fff]{1,4}(?:/[\u4e00-\u9fff]{1,2})?)"
)
_QUANTITY = re.compile(
    rf"(?<![A-Za-z\d_.])(?P<sign>(?:[-+负]|[Nn]egative\b)\s?)?\$?(?P<digits>{_DIGITS})(?:[eE](?P<exponent>[-+]?\d+))?"
    r"(?P<fraction>\s?/\s?\d++(?![.,]*\d)|\s\d+/\d+)?"
    r"(?P<scale>[万亿千百](?![\u4e00-\u9fff]分)|\s?(?:hundred|thousand|million|billion|trillion)\b)?"
    rf"(?:\s?(?P<unit>{_UNIT_TEXT}))?"
)
_TIMES_TEN = re.compile(r"(?<=\d)\s?[*x]\s?10\s?(?:\^|\*\*)\s?(?:\{([-+]?\d{1,4})\}|([-+]?\d{1,4}))(?![\d.])")
_TEN = re.compile(r"(?<![\w.^/*])(?<![/*]\s)10\s?(?:\^|\*\*)\s?(?:\{([-+]?\d{1,4})\}|([-+]?\d{1,4}))(?![\d.])")
_CHINESE = re.compile(r"(?:百分之)?负?[零〇一二两三四五六七八九十百千万亿点]+")
_TEX_FRACTION = re.compile(r"(\d?)\\[dt]?frac(?:\{([^{}]{1,40})\}\{([^{}]{1,40})\}|(\d)(\d))")
_TEX = re.compile(r"\\(?:text|mathrm|mathbf|mbox)\{([^{}]{0,40})\}|\\[,;!: ()\[\]]|\\(?:left|right)|[$]|\\(?=%)|~")
_TEX_SIGNS = {"\\times": "*", "\\cdot": "*", "\\div": "/", "\\approx": "≈", "^\\circ": "°", "\\%": "%", "\\mu": "μ"}
_TEX_SIGNS["{,}"] = ","
_TEX_MATHS = r"\\(?:sqrt|pi|frac|log|ln|exp|sin|cos|tan|binom|infty|theta|alpha|beta|pm|mp)"
_OPERAND = re.compile(r"(?:[(^]|" + _TEX_MATHS + r"(?:\[\d\])?\{?)\s*$")
_OPERATOR = re.compile(
    # A star with a space on one side alone closes bold print.
    r"(\s?)\*{1,2}\1[-({\d]|\s?[\^+/]\s?[-({\d]|\(\d|\s-\s?\d|-\d|\s?" + _TEX_MATHS + r"|\s?[-+*^]\s?[b-z](?![A-Za-z])"
)
_LEFT_OPEN = re.compile(
    r"(?:[\w)] ?\*{1,2} +|[\w)]\*{1,2}|\d \*{1,2}|[/^+]\s*)$|" + _TEX_MATHS + r"(?:\[\d\])?\{?\s*$"
)
"""In front of the last number: its operator, which **bold print** is not."""
_DENIED = re.compile(r"(?:\bnot|n't|\bnever|[≠≤≥]|不是|\b(?:less|more|fewer|greater) than)[\s*_]*$", re.I)
_EITHER = re.compile(r"\s*(?:或|还是|到|至|、|和|or\b)")
_BOXED = re.compile(r"\\boxed\{")
_CUE = re.compile(
    r"(?:\b(?:answer|result)\b(?:\s+(?:is|are|comes to|equals)\b|\s*[:=])|####"
    r"|答案(?:应该|应|就)?\s*(?:是|为|:)|结果(?:是|为|:))"
    r"[\s*_:]*(?:(?:therefore|thus|about|approximately|roughly|exactly|约|大约|大概)\s*)*",
    re.I,
)
_EQUALS = re.compile(r"[=≈≃]|等于|约为")
_BETWEEN = re.compile(
    r"^[\s*_(]*(?:(?:,|、|/|~|-|–|\.\.|\||(?:to|or|and|vs|maybe|perhaps|possibly)\b|或者?|还是|也?可能是?|和|到|至)[\s*_(]*)+"
    r"(?=[-+$]?[.\d])"
)
_SCALES = {"百": 100, "千": 1000, "万": 10_000, "亿": 100_000_000}
_SCALES |= {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_NUMERALS = dict(zip("零〇一二两三四五六七八九", (0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9), strict=True))
MAX_STATED = 8
"""Of "the answer is": an answer that says it more often settles on nothing."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number and the text of the unit behind it ("" where there is none)."""

    value: Fraction
    unit: str = ""


def stated_quantities(text: str, *, expressions: bool = False) -> list[Quantity]:
    """What a final answer (see `final_answer`) says the number is: each of the statements, which ought to agree.

    The strongest kind of statement that there is counts alone: what stands in \\boxed, else behind "the answer is",
    else behind the last equals sign, else the last number. Several numbers in its place ("3 or 4", "1, 2, 3",
    "10-20") settle on nothing.

    Args:
        expressions: whether arithmetic that is left to the reader ("12 * 7") is a number; fractions and powers of
            ten always are.

    Returns:
        Nothing where no number is settled on.
    """
    text = _without_tex(text).replace("mm Hg", "mmHg")
    places = [found.end() for found in _BOXED.finditer(text)]
    if places:
        said = [text[place : _closing(text, place)] for place in places[-MAX_STATED - 1 :]]
    else:
        cues = [found.end() for found in _CUE.finditer(text)]
        said = [_sentence(text, place) for place in cues[-MAX_STATED - 1 :]]
    said = [one for one in said if any(map(str.isdigit, one)) or _CHINESE.search(one[:12])]
    if len(said) > MAX_STATED:
        return []
    if said:
        quantities = [_only(_behind_equals(one), expressions) for one in said]
        return [q for q in quantities if q is not None] if None not in quantities else []
    *_, last = ["", *_EQUALS.split(text[-2000:])] if _EQUALS.search(text[-2000:]) else ["", ""]
    quantity = _only(_sentence(last, 0), expressions) if last else _last(text[-2000:])
    return [quantity] if quantity is not None else []


def numbers_in(text: str, *, after_equals: bool = False) -> list[Fraction]:
    """Every number of the text in order; `after_equals` keeps those right behind an equals sign."""
    found, text = [], _with_exponents(text)
    for match in _QUANTITY.finditer(text):
        if after_equals and not _EQUALS.search(text[max(0, match.start() - 3) : match.start()]):
            continue
        if (quantity := _quantity(match)) is not None:
            found.append(quantity.value)
    return found


def parse_quantity(text: str) -> Quantity | None:
    """A gold answer: "3.2 mg/dL", "1,200", "3/4", "二十三"; None where it is no number, or more than one."""
    text = _without_tex(text).strip()
    found = _QUANTITY.match(text)
    if found is not None:
        rest = text[found.end() :]
        alone = not any(map(str.isdigit, rest)) and not _is_unfinished(text, found)
        return _quantity(found) if alone else None
    chinese = _CHINESE.match(text)
    return _chinese_quantity(chinese.group(), text[chinese.end() :][:MAX_UNIT]) if chinese else None


@lru_cache(maxsize=1024)
def chinese_number(text: str) -> Fraction | None:
    """二十三, 一百零五, 三点一四, 两千三百, 一万二千, 百分之五, 负三, 二〇二六; None where it is no numeral."""
    if text.startswith("百分之"):
        share = chinese_number(text[3:])
        return None if share is None else share / 100
    if text.startswith("负"):
        positive = chinese_number(text[1:])
        return None if positive is None else -positive
    whole, point, part = text.partition("点")
    if not whole or len(text) > 40 or (point and not (part and all(sign in _NUMERALS for sign in part))):
        return None
    value = _whole(whole)
    if value is None or not point:
        return None if value is None else Fraction(value)
    return value + Fraction(int("".join(str(_NUMERALS[sign]) for sign in part)), 10 ** len(part))


def _whole(text: str) -> int | None:
    if all(sign in _NUMERALS for sign in text):
        return int("".join(str(_NUMERALS[sign]) for sign in text))
    total = section = digit = 0
    for sign in text:
        if sign in _NUMERALS:
            digit = _NUMERALS[sign]
        elif sign == "十" or sign in "百千":
            section += (digit or 1) * (10 if sign == "十" else _SCALES[sign])
            digit = 0
        elif sign == "亿":
            total, section, digit = (total + section + digit) * _SCALES[sign], 0, 0
        elif sign == "万":
            total, section, digit = total + (section + digit) * _SCALES[sign], 0, 0
        else:
            return None
    return total + section + digit


def _quantity(found: re.Match[str]) -> Quantity | None:
    digits = found["digits"].replace(",", "")
    try:
        value = number(f"{digits}e{found['exponent'] or 0}")
        if fraction := found["fraction"]:
            if "/" in fraction.strip()[1:]:  # 3 1/2
                above, _, below = fraction.strip().partition("/")
                value += number(above) / number(below)
            else:
                value /= number(fraction.strip(" /"))
    except (NotArithmetic, ZeroDivisionError):
        return None
    value *= _SCALES.get((found["scale"] or "").strip(), 1)
    sign = (found["sign"] or "+").strip()
    return Quantity(value if sign == "+" else -value, (found["unit"] or "")[:MAX_UNIT])


def _chinese_quantity(numeral: str, measured: str) -> Quantity | None:
    value = chinese_number(numeral)
    if value is None:
        return None
    return Quantity(value * 100, "%") if numeral.startswith("百分之") else Quantity(value, measured)


def _only(text: str, expressions: bool) -> Quantity | None:
    """The one quantity that a statement begins with."""
    text = text.strip(" *_\n\t:")
    found = _QUANTITY.search(text[:200])
    chinese = _CHINESE.match(text)
    if chinese and (found is None or chinese.start() < found.start()):
        rest = text[chinese.end() :]
        measured = re.split(r"[,.;。，；\s]", rest)[0][:6]
        return None if _EITHER.match(rest) else _chinese_quantity(chinese.group(), measured)
    if found is None or _DENIED.search(text[: found.start()]):
        return None
    rest = text[found.end() :]
    if _is_unfinished(text, found):
        return _evaluated(text) if expressions else None
    if _BETWEEN.match(rest) or _BETWEEN.match((found["unit"] and (found["unit"] + rest)) or ""):
        return None
    return _quantity(found)


def _is_unfinished(text: str, found: re.Match[str]) -> bool:
    """Whether the number is part of arithmetic that is left to the reader, or the factor of a variable."""
    return bool(_OPERAND.search(text[: found.start()]) or _OPERATOR.match(text, found.end()) or _is_factor(found))


def _is_factor(found: re.Match[str]) -> bool:
    """Whether a letter that is no unit stands right behind the number: 5x, 5x^2."""
    place = found.start("unit")
    return place > 0 and not found.string[place - 1].isspace() and _is_variable(found["unit"])


def _is_variable(text: str) -> bool:
    return text[:1].islower() and text[:2].rstrip("^") == text[:1] and unit(text) is None


def _evaluated(text: str) -> Quantity | None:
    found = re.match(r"(?:[-+*/^().,\d\s]|(?<=\d)e(?=[-+]?\d))+", text)
    try:
        return Quantity(evaluate(found.group().rstrip(" .,*"))) if found else None
    except NotArithmetic:
        return None


def _last(text: str) -> Quantity | None:
    matches = list(_QUANTITY.finditer(text))
    if not matches:
        chinese = _CHINESE.fullmatch(text.strip(" 。.!\n"))
        return _chinese_quantity(chinese.group(), "") if chinese else None
    last = matches[-1]
    if len(matches) > 1 and _BETWEEN.match(_joint(text[matches[-2].start() :], matches[-2], last)):
        return None
    before = text[: last.start()]
    unfinished = _LEFT_OPEN.search(before) or _OPERATOR.match(text, last.end()) or _is_factor(last)
    return None if unfinished or _DENIED.search(before) else _quantity(last)


def _joint(text: str, first: re.Match[str], second: re.Match[str]) -> str:
    """What stands between two numbers, and the second; the unit of the first is passed over."""
    begin = first.start("unit") if first["unit"] else first.end()
    between = text[begin - first.start() : second.start() - first.start()]
    unit = first["unit"] or ""
    if unit and not re.match(r"(?:to|or|and|或|和|到|至)", unit):
        between = between[len(unit) :]
    return between + second.group()


def _sentence(text: str, start: int) -> str:
    """From `start` to the end of the line or sentence, at most 200 characters."""
    piece = text[start : start + 200].lstrip(" \n*_")
    return re.split(r"\n|[。;]|[.!?](?=\s|$)", piece, maxsplit=1)[0]


def _behind_equals(text: str) -> str:
    return _EQUALS.split(text)[-1]


def _closing(text: str, start: int) -> int:
    """Where the brace that was opened before `start` closes."""
    depth = 1
    for place in range(start, min(len(text), start + 400)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return place
    return start


def _without_tex(text: str) -> str:
    """Numbers as they are written without TeX, and powers of ten with an exponent."""
    if "\\" in text or "$" in text or "{,}" in text:
        for sign, plain in _TEX_SIGNS.items():
            text = text.replace(sign, plain)
        text = _TEX.sub(lambda found: found.group(1) or "", _TEX_FRACTION.sub(_as_fraction, text))
    return _with_exponents(text)


def _as_fraction(found: re.Match[str]) -> str:
    whole, above, below, one, other = found.groups()
    return f"{whole}{' ' * len(whole)}{above or one}/{below or other}"


def _with_exponents(text: str) -> str:
    if "10" not in text:
        return text
    text = _TIMES_TEN.sub(lambda found: f"e{found.group(1) or found.group(2)}", text)
    return _TEN.sub(lambda found: f"1e{found.group(1) or found.group(2)}", text)

"""Units of medicine and daily life, and what one is in another. Exact factors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

MAX_UNIT = 24
"""Characters of the longest unit that is looked at."""

_TABLE: dict[str, dict[str, str]] = {
    "mass": {
        "1": "g gram grams 克",
        "1000": "kg kgs kilogram kilograms 公斤 千克",
        "1e-3": "mg milligram milligrams 毫克",
        "1e-6": "mcg ug μg microgram micrograms 微克",
        "1e-9": "ng nanogram nanograms 纳克",
        "453.59237": "lb lbs pound pounds 磅",
        "28.349523125": "oz ounce ounces 盎司",
        "500": "斤",
    },
    "volume": {
        "1": "L l liter liters litre litres 升",
        "0.1": "dL dl 分升",
        "1e-3": "mL ml milliliter milliliters millilitre millilitres cc cm3 毫升",
        "1e-6": "μL ul μl mm3 微升",
        "1e-15": "fL fl",
    },
    "length": {
        "1": "m meter meters metre metres 米",
        "1000": "km 公里",
        "0.01": "cm centimeter centimeters centimetre centimetres 厘米",
        "1e-3": "mm 毫米",
        "0.0254": "in inch inches 英寸",
        "0.3048": "ft foot feet 英尺",
    },
    "time": {
        "1": "s sec secs second seconds 秒",
        "1e-3": "ms msec millisecond milliseconds 毫秒",
        "60": "min mins minute minutes 分钟",
        "3600": "h hr hrs hour hours 小时",
        "86400": "d day days 天 日",
        "604800": "week weeks wk 周",
    },
    "amount": {
        "1": "mol 摩尔",
        "1e-3": "mmol 毫摩尔 毫摩",
        "1e-6": "μmol umol 微摩尔",
        "1e-9": "nmol",
        "1e-12": "pmol",
    },
    "charge": {"1": "Eq", "1e-3": "mEq meq"},
    "osmoles": {"1e-3": "mOsm mosm"},
    "activity": {"1": "U IU iu unit units 单位 国际单位", "1e-3": "mU mIU", "1e-6": "μIU μU uIU"},
    "pressure": {"1": "Pa", "1000": "kPa 千帕", "133.322": "mmHg mmhg 毫米汞柱"},
    "energy": {"1": "kJ", "4.184": "kcal 千卡 大卡", "4.184e-3": "cal"},
    "beats": {"1": "beat beats 次"},
    "share": {"1": "1", "1e-2": "% percent 百分比", "1e-3": "‰"},
    "celsius": {"1": "°C ℃ celsius 摄氏度"},
}
_KNOWN = {
    name: (dimension, Fraction(factor))
    for dimension, units in _TABLE.items()
    for factor, names in units.items()
    for name in names.split()
}
_PART = re.compile(r"(.+?)\^?([23])?$")


@dataclass(frozen=True, slots=True)
class Unit:
    """value in base units = factor * value + offset."""

    dimensions: tuple[tuple[str, int], ...]
    factor: Fraction
    offset: Fraction = Fraction(0)


@lru_cache(maxsize=4096)
def unit(text: str) -> Unit | None:
    """A unit such as mg, mmol/L, mL/kg/h, kg/m^2, 毫克/天, %; None where it is not known."""
    text = text.strip().replace("per ", "/").replace("每", "/").replace("\u00b5", "μ").replace("degrees ", "°")
    if not text or len(text) > MAX_UNIT:
        return None
    if text in ("°F", "℉", "fahrenheit", "°fahrenheit", "华氏度"):
        return Unit((("celsius", 1),), Fraction(5, 9), Fraction(-160, 9))
    if text == "bpm":
        text = "beats/min"
    powers: dict[str, int] = {}
    factor = Fraction(1)
    for index, part in enumerate(text.split("/")):
        known = _one(part.strip())
        if known is None:
            return None
        dimension, size, exponent = known
        signed = exponent if index == 0 else -exponent
        powers[dimension] = powers.get(dimension, 0) + signed
        factor *= size**signed
    # A share has no dimension: % of something is a number.
    return Unit(tuple(sorted((name, power) for name, power in powers.items() if power)), factor)


SHARE = Unit((("share", 1),), Fraction(1))


def convert(value: Fraction, source: Unit, target: Unit) -> Fraction | None:
    """The value in another unit; None where they measure different things."""
    if source.dimensions != target.dimensions:
        return None
    return (value * source.factor + source.offset - target.offset) / target.factor


def _one(name: str) -> tuple[str, Fraction, int] | None:
    for candidate in (name, name.lower()):
        if candidate in _KNOWN:
            return (*_KNOWN[candidate], 1)
    found = _PART.match(name)
    if found and found.group(2) and found.group(1) in _KNOWN:
        return (*_KNOWN[found.group(1)], int(found.group(2)))
    return None

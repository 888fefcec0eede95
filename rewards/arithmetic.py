"""Exact arithmetic on text, bounded: what would be long to compute is refused before it is begun."""

from __future__ import annotations

import re
from fractions import Fraction

MAX_CHARS = 200
MAX_DIGITS = 40
"""Of one number as written; a power of ten beside it counts with the exponent's limit."""
MAX_DEPTH = 24
MAX_EXPONENT = 256
MAX_BITS = 4096
"""Of any value on the way, numerator or denominator."""

_TOKEN = re.compile(r"\s*(?:((?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)|(\*\*|[-+*/^()]))")
_GROUPED = re.compile(r"(?<![\d.])\d{1,3}(?:,\d{3})+(?!\d)")


class NotArithmetic(ValueError):
    """No expression of + - * / ^ and parentheses, or one over the limits."""


def evaluate(text: str) -> Fraction:
    """The exact value of an expression of + - * / ^ (or **) and parentheses; 1,234 has a separator of thousands.

    ^ binds to the right and tighter than a sign before it: -2^2 is -4. Exponents are whole numbers.

    Raises:
        NotArithmetic: anything else, division by zero, or over MAX_CHARS, MAX_DIGITS, MAX_DEPTH, MAX_EXPONENT or
            MAX_BITS. Costs at most a fraction of a millisecond.
    """
    if len(text) > MAX_CHARS:
        raise NotArithmetic(f"over {MAX_CHARS} characters")
    text = _GROUPED.sub(lambda found: found.group().replace(",", ""), text).strip()
    tokens: list[str | Fraction] = []
    position = 0
    while position < len(text):
        found = _TOKEN.match(text, position)
        if found is None:
            raise NotArithmetic(f"something else at character {position + 1}")
        tokens.append(number(found.group(1)) if found.group(1) else found.group(2).replace("**", "^"))
        position = found.end()
    parser = _Parser(tokens)
    value = parser.sum(0)
    if parser.place != len(tokens):
        raise NotArithmetic("more after the end")
    return value


def number(text: str) -> Fraction:
    """A decimal number such as 12, .5, 1.5e-3.

    Raises:
        NotArithmetic: more than MAX_DIGITS digits, or a power of ten over MAX_EXPONENT.
    """
    digits, _, exponent = text.lower().partition("e")
    if len(digits) > MAX_DIGITS or len(exponent) > 5 or abs(int(exponent or 0)) > MAX_EXPONENT:
        raise NotArithmetic("a number that is too long")
    whole, _, part = digits.partition(".")
    value = int(whole + part or 0)
    power = int(exponent or 0) - len(part)
    return Fraction(value * 10**power) if power >= 0 else Fraction(value, 10**-power)


class _Parser:
    """Recursive descent over the tokens; `depth` counts what is open."""

    def __init__(self, tokens: list[str | Fraction]):
        self.tokens = tokens
        self.place = 0

    def next(self) -> str | Fraction | None:
        return self.tokens[self.place] if self.place < len(self.tokens) else None

    def sum(self, depth: int) -> Fraction:
        if depth > MAX_DEPTH:
            raise NotArithmetic(f"deeper than {MAX_DEPTH}")
        value = self.product(depth)
        while (sign := self.next()) in ("+", "-"):
            self.place += 1
            other = self.product(depth)
            value = _small(value + other if sign == "+" else value - other)
        return value

    def product(self, depth: int) -> Fraction:
        value = self.signed(depth)
        while (sign := self.next()) in ("*", "/"):
            self.place += 1
            other = self.signed(depth)
            if sign == "/" and not other:
                raise NotArithmetic("division by zero")
            value = _small(value * other if sign == "*" else value / other)
        return value

    def signed(self, depth: int) -> Fraction:
        negative = False
        while (sign := self.next()) in ("+", "-"):
            self.place += 1
            negative ^= sign == "-"
        value = self.power(depth)
        return -value if negative else value

    def power(self, depth: int) -> Fraction:
        base = self.atom(depth)
        if self.next() != "^":
            return base
        self.place += 1
        if depth > MAX_DEPTH:
            raise NotArithmetic(f"deeper than {MAX_DEPTH}")
        return _power(base, self.signed(depth + 1))

    def atom(self, depth: int) -> Fraction:
        token = self.next()
        self.place += 1
        if isinstance(token, Fraction):
            return token
        if token != "(":
            raise NotArithmetic("no number where one belongs")
        value = self.sum(depth + 1)
        if self.next() != ")":
            raise NotArithmetic("a parenthesis that is not closed")
        self.place += 1
        return value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1 or abs(exponent) > MAX_EXPONENT:
        raise NotArithmetic(f"an exponent that is no whole number within {MAX_EXPONENT}")
    if not base and exponent < 0:
        raise NotArithmetic("division by zero")
    if abs(exponent) * max(base.numerator.bit_length(), base.denominator.bit_length()) > MAX_BITS:
        raise NotArithmetic("a power that is too large")
    return Fraction(base**exponent.numerator)


def _small(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise NotArithmetic("a value that is too large")
    return value

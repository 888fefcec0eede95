"""Regular expressions that cannot run away: one whose worst case over an answer is long is refused beforehand.

Backtracking is exponential where something of variable length is repeated, and a product of the choices otherwise.
Both can be read off the parsed pattern, so the bound is a property of the pattern, not of a clock.
"""

from __future__ import annotations

import re
from functools import lru_cache
from re import _constants, _parser  # type: ignore[attr-defined]  # the only parser of Python's own syntax there is
from typing import Any

MAX_CHARS = 4_096
"""Of an answer that a pattern is matched with."""
MAX_STEPS = 2**26
"""Places and choices to try in the worst case, about a quarter of a second."""

_POSSESSIVE = (_constants.POSSESSIVE_REPEAT, _constants.ATOMIC_GROUP)
_REPEATS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT)
_REMEDY = (
    "write repeats that need not give anything back possessively (`++`, `*+`, `(?>...)`), or anchor the pattern with "
    r"\A"
)


@lru_cache(maxsize=256)
def bounded(pattern: str, *, anchored: bool = False, what: str = "pattern") -> re.Pattern[str]:
    """The compiled pattern.

    Args:
        anchored: whether it is tried at one place alone, as by `fullmatch`.
        what: how a refusal calls it.

    Raises:
        ValueError: it is broken, refers back to a group, repeats something of variable length, or may take more
            than MAX_STEPS over MAX_CHARS characters.
    """
    try:
        parsed = _parser.parse(pattern)
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{what}: got {pattern!r} ({error}), expected a regular expression; correct it") from error
    steps = _choices(parsed, what, pattern) * (1 if anchored or _starts_fixed(parsed) else MAX_CHARS)
    if steps > MAX_STEPS:
        raise ValueError(
            f"{what}: got {pattern!r}, which may try {steps:.1e} ways over {MAX_CHARS} characters, expected at most "
            f"{MAX_STEPS:.1e}; {_REMEDY}"
        )
    return compiled


def _choices(parsed: Any, what: str, pattern: str) -> int:
    """How many ways there are through a part, at most."""
    ways = 1
    for code, value in parsed:
        if code in _REPEATS:
            low, high, inner = value
            inside = _choices(inner, what, pattern)
            if high > 1 and inside > 1:
                raise ValueError(
                    f"{what}: got {pattern!r}, which repeats something of variable length, expected none, which may "
                    f"take exponential time; {_REMEDY}"
                )
            ways *= min(int(high) - low + 1, MAX_CHARS + 1) * inside
        elif code is _constants.BRANCH:
            ways *= sum(_choices(branch, what, pattern) for branch in value[1])
        elif code is _constants.GROUPREF or code is _constants.GROUPREF_EXISTS:
            raise ValueError(f"{what}: got {pattern!r}, which refers back to a group, expected none; write it out")
        else:
            for inner in _inner(code, value):
                # What does not give back costs its own tries, once at each place.
                inside = _choices(inner, what, pattern)
                ways *= 1 if code in _POSSESSIVE and inside <= MAX_CHARS + 1 else inside
    return ways


def _inner(code: Any, value: Any) -> list[Any]:
    if code is _constants.SUBPATTERN:
        return [value[-1]]
    if code is _constants.POSSESSIVE_REPEAT:
        return [value[2]]
    if code is _constants.ATOMIC_GROUP:
        return [value]
    if code in (_constants.ASSERT, _constants.ASSERT_NOT):
        return [value[1]]
    return []


def _starts_fixed(parsed: Any) -> bool:
    first = parsed[0] if len(parsed) else (None, None)
    return first[0] is _constants.AT and first[1] is _constants.AT_BEGINNING_STRING

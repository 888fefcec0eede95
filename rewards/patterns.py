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
"""Ways to try in the worst case, about a quarter of a second."""
WAY = 8
"""Characters that can be looked at in the time that one way takes."""

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
    effort = _effort(parsed, what, pattern)[1] * (1 if anchored or _starts_fixed(parsed) else MAX_CHARS)
    steps = effort / WAY
    if steps > MAX_STEPS:
        raise ValueError(
            f"{what}: got {pattern!r}, which may try {steps:.1e} ways over {MAX_CHARS} characters, expected at most "
            f"{MAX_STEPS:.1e}; {_REMEDY}"
        )
    return compiled


def _effort(parsed: Any, what: str, pattern: str) -> tuple[int, int, bool]:
    """How many ways there are through a part, the effort of trying all of them, and whether there is no choice in it.

    A character that is looked at is 1, a way that is tried WAY.
    """
    ways, effort, fixed = 1, 0, True
    for code, value in parsed:
        own, cost, no_choice = 1, 1, True
        if code in _REPEATS or code is _constants.POSSESSIVE_REPEAT:
            low, high, inner = value
            inside, each, no_choice = _effort(inner, what, pattern)
            times = min(int(high), MAX_CHARS + 1)
            # Without a choice every character is looked at once, and the rest of the text once in vain.
            cost = min(times * each, each + 2 * MAX_CHARS) if no_choice else times * each
            if code in _REPEATS:
                own = min(int(high) - low + 1, MAX_CHARS + 1) * inside
                if high > 1 and inside > 1:
                    raise ValueError(
                        f"{what}: got {pattern!r}, which repeats something of variable length, expected none, which "
                        f"may take exponential time; {_REMEDY}"
                    )
        elif code is _constants.BRANCH:
            branches = [_effort(branch, what, pattern) for branch in value[1]]
            own, cost, no_choice = sum(b[0] for b in branches), sum(b[1] for b in branches), False
        elif code is _constants.GROUPREF or code is _constants.GROUPREF_EXISTS:
            raise ValueError(f"{what}: got {pattern!r}, which refers back to a group, expected none; write it out")
        elif code is _constants.SUBPATTERN:
            own, cost, no_choice = _effort(value[-1], what, pattern)
        elif code is _constants.ATOMIC_GROUP:
            _, cost, no_choice = _effort(value, what, pattern)
        elif code in (_constants.ASSERT, _constants.ASSERT_NOT):
            # It looks at characters without taking them, and so at the same ones again.
            cost, no_choice = _effort(value[1], what, pattern)[1], False
        effort += ways * (cost + WAY * (own - 1))
        ways *= own
        fixed &= no_choice and own == 1
    return ways, effort, fixed


def _starts_fixed(parsed: Any) -> bool:
    first = parsed[0] if len(parsed) else (None, None)
    return first[0] is _constants.AT and first[1] is _constants.AT_BEGINNING_STRING

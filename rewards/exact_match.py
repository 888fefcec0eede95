"""Rewards with one right answer."""

from __future__ import annotations

import re
from typing import Any

_STATED = re.compile(
    r"\b(?i:answer|option|choice)\s*(?i:is\b|:)?[:(*\s]*([A-J])(?!\w)"
    r"|答案\s*[是为：:]?\s*[(（]?([A-J])(?![A-Za-z])"
)
_LEADING = re.compile(r"^\W*([A-J])(?:[.):,、。*]|\s*$)")
_GOLD = re.compile(r"^\W*([A-Ja-j])(?:\W|$)")


def multiple_choice(
    prompts: list[str], responses: list[str], *, answer: list[str | None], **columns: Any
) -> list[float | None]:
    """1 where the answer names the letter of `answer` ("C" or "C. text"), 0 where it names another or none.

    None where the row has no letter to compare with.
    """
    return [_score(response, gold) for response, gold in zip(responses, answer, strict=True)]


def stated_letter(response: str) -> str | None:
    """The letter that a response settles on: the last "answer is X", else a letter in front."""
    stated = [a or b for a, b in _STATED.findall(response)]
    if stated:
        return stated[-1]
    leading = _LEADING.match(response)
    return leading.group(1) if leading else None


def _score(response: str, answer: str | None) -> float | None:
    gold = _GOLD.match(answer) if answer else None
    if gold is None:
        return None
    return float(stated_letter(response) == gold.group(1).upper())

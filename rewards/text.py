"""Rewards that look at the form of an answer: finished, of a fitting length, not repeating, not refusing."""

from __future__ import annotations

import re
from typing import Any

_WORD = re.compile(r"[^\W_\u3400-\u9fff]+(?:['’-][^\W_\u3400-\u9fff]+)*|[\u3400-\u9fff]")
_FINISHED = re.compile(r"[.!?。！？…][\"'”’)\]）」』*]*$")
_REFUSALS = re.compile(
    r"\b(?:i(?:'m| am) (?:sorry|unable|not able)"
    r"|i (?:can(?:'t|not)|won't|will not) (?:help|assist|answer|provide|comply)"
    r"|as an ai|i(?:'m| am) (?:just |only )?an ai)\b"
    r"|抱歉|对不起|我(?:无法|不能)(?:回答|提供|帮助)|作为(?:一个|一名)?(?:AI|人工智能)",
    re.IGNORECASE,
)


def words(text: str) -> list[str]:
    """Words of a text, in lower case; each Chinese character counts as one."""
    return _WORD.findall(text.lower())


def finished_sentence(prompts: list[str], responses: list[str], **columns: Any) -> list[float | None]:
    """1 where the answer has words and its last sentence is closed, else 0."""
    return [float(bool(words(r)) and bool(_FINISHED.search(r.rstrip()))) for r in responses]


def length_between(
    prompts: list[str], responses: list[str], *, min_words: int = 15, max_words: int = 60, **columns: Any
) -> list[float | None]:
    """1 between the limits; below, the share of `min_words` reached; above, falling to 0 at twice `max_words`."""

    def score(count: int) -> float:
        if count < min_words:
            return count / min_words
        return max(0.0, min(1.0, 2.0 - count / max_words))

    return [score(len(words(r))) for r in responses]


def no_repetition(prompts: list[str], responses: list[str], **columns: Any) -> list[float | None]:
    """Share of three-word sequences that are not a repetition: 1 for fresh text, near 0 for a loop, 0 for no text."""

    def score(response: str) -> float:
        found = words(response)
        triples = list(zip(found, found[1:], found[2:], strict=False))
        return len(set(triples)) / len(triples) if triples else float(bool(found))

    return [score(r) for r in responses]


def no_refusal(prompts: list[str], responses: list[str], **columns: Any) -> list[float | None]:
    """0 where the first 200 characters decline to answer, or nothing is said; else 1."""
    return [float(bool(words(r)) and not _REFUSALS.search(r[:200])) for r in responses]

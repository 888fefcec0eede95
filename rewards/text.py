"""Rewards that look at the words of an answer: finished, of a fitting length, not repeating, not refusing, and taking
up those of the question."""

from __future__ import annotations

import re
from typing import Any

from rewards.base import only_where

_WORD = re.compile(r"[^\W_\u3400-\u9fff]+(?:['’-][^\W_\u3400-\u9fff]+)*|[\u3400-\u9fff]")
_FINISHED = re.compile(r"[.!?。！？…][\"'”’)\]）」』*]*$")
_REFUSALS = re.compile(
    r"\b(?:i(?:'m| am) (?:sorry|unable|not able)"
    r"|i (?:can(?:'t|not)|won't|will not) (?:help|assist|answer|provide|comply)"
    r"|as an ai|i(?:'m| am) (?:just |only )?an ai)\b"
    r"|抱歉|对不起|我(?:无法|不能)(?:回答|提供|帮助)|作为(?:一个|一名)?(?:AI|人工智能)",
    re.IGNORECASE,
)

_GRAMMAR = """
a about am an and any are as at be been but by can could did do does for from had has have he her his how i if in into
is it its may me might my no not of on or our shall she should so some than that the their them then there these they
this those to too us was we were what when where which who whom whose why will with would you your
的 了 是 在 有 和 与 或 吗 呢 吧 啊 么 什 怎 样 为 何 哪 些 我 你 您 他 她 它 们 这 那 个 一 不 会 能 可 以 要 该 如
"""
_FUNCTION_WORDS = frozenset(_GRAMMAR.split())


def words(text: str) -> list[str]:
    """Words of a text, in lower case; each Chinese character counts as one."""
    return _WORD.findall(text.lower())


def finished_sentence(prompts: list[str], responses: list[str], **columns: Any) -> list[float | None]:
    """1 where the answer has words and its last sentence is closed, else 0."""
    return [float(bool(words(r)) and bool(_FINISHED.search(r.rstrip()))) for r in responses]


def check_lengths(*, min_words: int, max_words: int) -> None:
    """Raises ValueError for limits that leave no room."""
    if not 0 <= min_words <= max_words or max_words < 1:
        raise ValueError(
            f"got min_words {min_words} and max_words {max_words}, expected 0 <= min_words <= max_words and max_words "
            "of 1 or more; correct them"
        )


@only_where(check_lengths)
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


def question_words(prompts: list[str], responses: list[str], **columns: Any) -> list[float | None]:
    """Share of the question's content words that the answer takes up; None where the question has none.

    Words of grammar do not count, and two words are the same where their first five letters are, without a final s. A
    clean answer speaks of what it was asked about, one made for another reward may not: a rule to measure by, and not
    to train on, since an echo meets it.
    """

    def stem(word: str) -> str:
        return word.removesuffix("s")[:5]

    def score(prompt: str, response: str) -> float | None:
        asked = {stem(word) for word in words(prompt) if word not in _FUNCTION_WORDS}
        said = {stem(word) for word in words(response)}
        return len(asked & said) / len(asked) if asked else None

    return [score(p, r) for p, r in zip(prompts, responses, strict=True)]

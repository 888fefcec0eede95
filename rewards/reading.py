"""What an answer says: plain characters, no reasoning before it, and only so much of it that a score stays cheap."""

from __future__ import annotations

import re
import unicodedata

MAX_CHARS = 20_000
"""Of a longer answer the end is read: that is where it settles."""

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_RAISED = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+")
_VULGAR = re.compile("[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]")
_SIGNS = str.maketrans(
    {
        **dict.fromkeys("−‐‑‒–", "-"),
        **dict.fromkeys("×✕·⋅∙", "*"),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", None),
        "÷": "/",
        "⁄": "/",
        "∕": "/",
    }
)


def plain(text: str) -> str:
    """The text with full-width forms, signs of arithmetic, raised digits and fractions in ASCII (NFKC otherwise).

    Letters of another alphabet that look like Latin ones stay what they are.
    """
    if text.isascii():
        return text
    text = _RAISED.sub(lambda found: "^" + found.group().translate(_SUPERSCRIPTS), text)
    text = _VULGAR.sub(lambda found: " " + unicodedata.normalize("NFKC", found.group()), text)
    return unicodedata.normalize("NFKC", text.translate(_SIGNS)).translate(_SIGNS)


def final_answer(response: str) -> str:
    """What follows the reasoning in `<think>`, and of that what stands in `<answer>`, where it does; in plain form.

    Reasoning that is not closed has no answer after it, and sections `<answer>` that differ are none.
    """
    text = response.rpartition("</think>")[2]
    if "<think>" in text:
        return ""
    text = text[-MAX_CHARS:]
    sections = {section.strip() for section in between(text, "<answer>", "</answer>")}
    return plain(text if not sections else sections.pop() if len(sections) == 1 else "")


def between(text: str, opening: str, closing: str) -> list[str]:
    """What stands in each closed pair of tags, in order; in linear time, which a lazy pattern would not keep to."""
    found, start = [], 0
    while (begin := text.find(opening, start)) >= 0 and (end := text.find(closing, begin)) >= 0:
        found.append(text[begin + len(opening) : end])
        start = end + len(closing)
    return found

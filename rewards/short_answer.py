"""Short answers in words: the same after normalising, the share of words shared, the share of a list's items."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

from rewards.reading import final_answer, plain

MAX_WORDS = 2_000
"""Words of an answer that are compared; one that is longer scores as if it ended there."""
MAX_ITEMS = 200

_WORD = re.compile(r"[^\W_\u3400-\u9fff]+(?:[.'’/+-][^\W_\u3400-\u9fff]+)*|[\u3400-\u9fff]")
_ARTICLES = frozenset(("a", "an", "the"))
_CUE = re.compile(
    r"(?:\banswers?\b(?:\s+(?:is|are|would be)\b|\s*:)|答案(?:应该|应|就)?\s*(?:是|为|:|有|包括))[\s*_:]*", re.I
)
_SENTENCE_END = re.compile(r"[。\n]|[.!?](?=\s|$)")
_ITEM = re.compile(r"[,;、，；\n]|(?:^|(?<=\n))\s*(?:[-*•]|\d{1,2}[.)])\s+")
_BULLET = re.compile(r"^\s*(?:[-*•]|\(?\d{1,2}[.):、])\s*")
_JOINED = re.compile(r"\s+(?:and|or|&)\s+|^\s*(?:and|or)\s+|和|与|及|以及|还有")


def same_answer(
    prompts: list[str], responses: list[str], *, answer: list[Any], aliases: list[Any] | None = None, **columns: Any
) -> list[float | None]:
    """1 where the answer is `answer` or one of `aliases`: without case, punctuation and articles; else 0.

    The answer is what follows the last "the answer is" or 答案是 up to the end of its sentence, else the whole text.

    Args:
        answer: text of each row, or several that are equally right.
        aliases: more of these.

    Returns:
        None where the row has no answer to compare with.
    """

    def score(words: list[str], golds: Sequence[tuple[str, ...]]) -> float:
        return float(tuple(words) in golds)

    return _over(responses, answer, aliases, score)


def word_f1(
    prompts: list[str], responses: list[str], *, answer: list[Any], aliases: list[Any] | None = None, **columns: Any
) -> list[float | None]:
    """F1 of the words (Chinese: characters) of the answer against those of the best of `answer` and `aliases`.

    As `same_answer` otherwise. Rajpurkar et al. 2016, SQuAD, section 6.1.
    """

    def score(words: list[str], golds: Sequence[tuple[str, ...]]) -> float:
        return max(_f1(Counter(words), Counter(gold)) for gold in golds)

    return _over(responses, answer, aliases, score)


def list_f1(
    prompts: list[str], responses: list[str], *, answer: list[Any], aliases: list[Any] | None = None, **columns: Any
) -> list[float | None]:
    """F1 of the items of an unordered list ("A, B and C", "A、B和C", bullets) against the items of `answer`.

    An item counts once, whatever its case, punctuation and articles; one that is said twice is no second item. An
    item that the gold does not have lowers the score as much as a missing one.

    Args:
        answer: items, or text that holds them.
        aliases: of each row a mapping from an item to its other names.

    Returns:
        None where the row has no item to compare with.
    """
    scores: list[float | None] = []
    for response, gold, names in zip(responses, answer, aliases or [None] * len(responses), strict=True):
        items = _gold_items(gold)
        if not items:
            scores.append(None)
            continue
        other = _other_names(names)
        said = {other.get(item, item) for item in _items(_stated(response), items | set(other))}
        scores.append(_f1(Counter(said), Counter(items)) if len(said) <= MAX_ITEMS else 0.0)
    return scores


def normalised(text: str) -> tuple[str, ...]:
    """Words in lower case without punctuation, and without articles unless that is all; a Chinese character is one."""
    return tuple(_words(text))


def _over(responses: list[str], answer: list[Any], aliases: list[Any] | None, score: Any) -> list[float | None]:
    scores: list[float | None] = []
    for response, gold, names in zip(responses, answer, aliases or [None] * len(responses), strict=True):
        golds = _golds(gold, names)
        scores.append(score(_words(_stated(response)), golds) if golds else None)
    return scores


def _golds(answer: Any, aliases: Any) -> list[tuple[str, ...]]:
    return [words for given in (answer, aliases) for text in _texts(given) if (words := _cached_words(text))]


def _texts(given: Any) -> list[str]:
    """One text or several; none in a number or a mapping, which a row may hold by mistake."""
    several = [given] if isinstance(given, str) else given if isinstance(given, Sequence) else ()
    return [text for text in several if isinstance(text, str)]


def _stated(response: str) -> str:
    text = final_answer(response)
    place = None
    for cue in _CUE.finditer(text):
        place = cue.end()
    if place is None:
        return text
    end = _SENTENCE_END.search(text, place)
    stated = text[place : end.start() if end else len(text)]
    return stated if stated.strip() else text[place:]


def _words(text: str) -> list[str]:
    words = [match.group() for match in islice(_WORD.finditer(plain(text).lower()), MAX_WORDS)]
    # "A" alone is no article: a blood group, a vitamin, an item of a list.
    return [word for word in words if word not in _ARTICLES] or words


@lru_cache(maxsize=1024)
def _cached_words(text: str) -> tuple[str, ...]:
    return tuple(_words(text))


def _f1(said: Counter[Any], gold: Counter[Any]) -> float:
    shared = (said & gold).total()
    return 2 * shared / (said.total() + gold.total()) if shared else 0.0


def _gold_items(answer: Any) -> set[str]:
    if isinstance(answer, str):
        return _items(answer, set())
    return {item for one in _texts(answer) if (item := _item(one))}


def _other_names(aliases: Any) -> dict[str, str]:
    given = aliases.items() if isinstance(aliases, Mapping) else ()
    return {_item(name): _item(item) for item, names in given for name in _texts(names)}


def _items(text: str, known: set[str]) -> set[str]:
    """The items of a list; a piece is split at "and" or 和 unless it is an item as it stands."""
    found: set[str] = set()
    for piece in _ITEM.split(text[: 8 * MAX_WORDS]):
        whole = _item(_BULLET.sub("", piece))
        if not whole:
            continue
        parts = [part for one in _JOINED.split(piece) if (part := _item(_BULLET.sub("", one)))]
        found |= {whole} if whole in known or (known and not known & set(parts)) else set(parts)
        if len(found) > MAX_ITEMS:
            break
    return found


@lru_cache(maxsize=4096)
def _item(text: str) -> str:
    return " ".join(_words(text[:200]))

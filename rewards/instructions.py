"""Instructions whose fulfilment can be checked, by the names and settings of IFEval (Zhou et al. 2023, table 1).

A row lists them in `instruction_id_list`, with a mapping of settings for each in `kwargs`, so the rows of that
benchmark score as they stand. The checks are our own: Chinese characters count as words, Chinese full stops end
sentences, and nothing is drawn or downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rewards.base import only_rows
from rewards.form import chinese_share, parse_json
from rewards.reading import plain

MAX_CHARS = 40_000
"""No instruction asks for more: a longer answer meets none."""

_WORD = re.compile(r"[^\W_\u3400-\u9fff]+(?:['’-][^\W_\u3400-\u9fff]+)*|[\u3400-\u9fff]")
_SENTENCE_END = re.compile(r"[.!?]+(?=[\s\"'”’)*]|$)|[。！？]+")
_ABBREVIATION = re.compile(r"\b(?:Dr|Mr|Mrs|Ms|Prof|St|vs|etc|e\.g|i\.e|Fig|No)\.(?=\s)|\b[A-Z]\.(?=\s?[A-Z])")
_PARAGRAPHS = re.compile(r"\n[ \t]*\*\*\*[ \t]*(?:\n|$)|\s\*\*\*\s")
_BULLET = re.compile(r"^[ \t]*[*•-][ \t]+\S", re.M)
_PLACEHOLDER = re.compile(r"\[[^\[\]\n]{1,200}\]")
_HIGHLIGHT = re.compile(r"(?<!\*)\*{1,2}[^*\n]{1,1000}\*{1,2}(?!\*)")
_TITLE = re.compile(r"<<[^<>\n]{1,1000}>>")
_CAPITAL_WORD = re.compile(r"\b[A-Z][A-Z'-]*\b")
_CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_OPENING, _CLOSING = "\"'“「『", "\"'”」』"

Check = Callable[..., bool]


def check_instructions(*, instruction_id_list: Any, kwargs: Any) -> bool:
    """Whether a row has instructions. Raises ValueError for those that cannot be checked."""
    wanted = _row(instruction_id_list, kwargs)
    for name, options in wanted:
        _met(name, "a word", options)
    return bool(wanted)


@only_rows(check_instructions)
def instructions_met(
    prompts: list[str], responses: list[str], *, instruction_id_list: list[Any], kwargs: list[Any], **columns: Any
) -> list[float | None]:
    """The share of the row's instructions that the answer meets. An empty answer meets none.

    Args:
        instruction_id_list: names (see CHECKS) of each row.
        kwargs: for each of them a mapping of its settings; those that are None are passed over.

    Returns:
        None where the row has no instructions.

    Raises:
        ValueError: an instruction that is not known, or settings that are not its own.
    """
    return _scores(responses, instruction_id_list, kwargs, lambda met: sum(met) / len(met))


@only_rows(check_instructions)
def all_instructions_met(
    prompts: list[str], responses: list[str], *, instruction_id_list: list[Any], kwargs: list[Any], **columns: Any
) -> list[float | None]:
    """1 where the answer meets every instruction of its row, else 0. As `instructions_met` otherwise."""
    return _scores(responses, instruction_id_list, kwargs, lambda met: float(all(met)))


def _scores(responses: list[str], names: list[Any], settings: list[Any], total: Any) -> list[float | None]:
    scores: list[float | None] = []
    for response, ids, given in zip(responses, names, settings, strict=True):
        wanted = _row(ids, given)
        text = response if len(response) <= MAX_CHARS and response.strip() else ""
        met = [bool(text) and _met(name, text, options) for name, options in wanted]
        scores.append(total(met) if met else None)
    return scores


def _row(ids: Any, given: Any) -> list[tuple[str, dict[str, Any]]]:
    """Name and settings of each instruction of a row."""
    if not ids:
        return []
    if isinstance(ids, str) or not isinstance(ids, Sequence):
        raise ValueError(f"instruction_id_list: got {ids!r}, expected a list of names; correct the row")
    settings = given if given is not None else [{}] * len(ids)
    if not isinstance(settings, Sequence) or len(settings) != len(ids) or not all(map(_are_settings, settings)):
        raise ValueError(
            f"kwargs: got {str(settings)[:100]} for {ids}, expected a mapping for each of its instructions; correct it"
        )
    wanted = []
    for name, options in zip(ids, settings, strict=True):
        if not isinstance(name, str) or name not in CHECKS:
            raise ValueError(f"instruction_id_list: got {name!r}, expected one of {sorted(CHECKS)}; correct the row")
        wanted.append((name, {key: value for key, value in (options or {}).items() if value is not None}))
    return wanted


def _are_settings(options: Any) -> bool:
    return options is None or isinstance(options, Mapping)


def _met(name: str, text: str, options: Mapping[str, Any]) -> bool:
    try:
        return CHECKS[name](text, **options)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"kwargs: got {dict(options)} for {name} ({error}), expected its settings") from error


def _compare(count: int, relation: str, wanted: int) -> bool:
    relations = {
        "at least": count >= wanted,
        "less than": count < wanted,
        "at most": count <= wanted,
        "more than": count > wanted,
        "exactly": count == wanted,
    }
    if relation not in relations:
        raise ValueError(f"kwargs: got relation {relation!r}, expected one of {sorted(relations)}; correct the row")
    return relations[relation]


def _has(text: str, keyword: str) -> int:
    """How often a word or phrase stands in a text, without case; of Chinese ones every occurrence."""
    pattern = re.escape(keyword.strip())
    if keyword.strip().isascii():
        pattern = rf"(?<![A-Za-z0-9_]){pattern}(?![A-Za-z0-9_])"
    return len(re.findall(pattern, text, re.I)) if keyword.strip() else 0


def _words_of(given: Sequence[str]) -> Sequence[str]:
    if isinstance(given, str):  # whose letters would be taken for words
        raise TypeError("one text where a list of words belongs")
    return given


def _sentences(text: str) -> int:
    """Closed sentences, and what is left open at the end."""
    text = _ABBREVIATION.sub("", text.strip())
    ends = list(_SENTENCE_END.finditer(text))
    rest = text[ends[-1].end() :] if ends else text
    return len(ends) + bool(_WORD.search(rest))


def _parts(text: str, pattern: re.Pattern[str]) -> list[str]:
    return [part.strip() for part in pattern.split(text) if part.strip()]


def keywords(text: str, *, keywords: Sequence[str]) -> bool:
    return all(_has(text, word) for word in _words_of(keywords))


def keyword_count(text: str, *, keyword: str, frequency: int, relation: str = "at least") -> bool:
    return _compare(_has(text, keyword), relation, frequency)


def no_keywords(text: str, *, forbidden_words: Sequence[str]) -> bool:
    return not any(_has(text, word) for word in _words_of(forbidden_words))


def letter_count(text: str, *, letter: str, let_frequency: int, let_relation: str = "at least") -> bool:
    return _compare(text.lower().count(letter.lower()), let_relation, let_frequency)


def language(text: str, *, language: str) -> bool:
    """Nine tenths in it. "zh" and "en" can be told."""
    share, name = chinese_share(text), language.lower().partition("-")[0]
    if name not in ("zh", "en"):
        raise ValueError(f"kwargs: got language {language!r}, expected zh or en; drop the instruction")
    return share is not None and (share if name == "zh" else 1 - share) >= 0.9


def word_count(text: str, *, num_words: int, relation: str = "at least") -> bool:
    return _compare(len(_WORD.findall(text)), relation, num_words)


def sentence_count(text: str, *, num_sentences: int, relation: str = "at least") -> bool:
    return _compare(_sentences(text), relation, num_sentences)


def paragraph_count(text: str, *, num_paragraphs: int) -> bool:
    """Parted by a line of three asterisks."""
    return len(_parts(f"\n{text}\n", _PARAGRAPHS)) == num_paragraphs


def paragraph_begins(text: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs parted by an empty line; the nth, from 1, begins with the word."""
    parts = _parts(text, re.compile(r"\n[ \t]*\n"))
    if len(parts) != num_paragraphs or not 1 <= nth_paragraph <= len(parts):
        return False
    begin = parts[nth_paragraph - 1].lstrip("\"'“*_ ").lower()
    word = first_word.lower()
    return begin.startswith(word) and not (word.isascii() and begin[len(word) : len(word) + 1].isalnum())


def placeholders(text: str, *, num_placeholders: int) -> bool:
    return len(_PLACEHOLDER.findall(text)) >= num_placeholders


def postscript(text: str, *, postscript_marker: str = "P.S.") -> bool:
    """A line that begins with the marker and goes on."""
    marker = postscript_marker.strip().lower()
    lines = [line.strip(" *_\t").lower() for line in text.splitlines()]
    return any(line.startswith(marker) and _WORD.search(line[len(marker) :]) for line in lines)


def bullets(text: str, *, num_bullets: int) -> bool:
    return len(_BULLET.findall(text)) == num_bullets


def constrained(text: str) -> bool:
    return text.strip(" *\"'\n") in _CONSTRAINED or text.strip(" *\"'\n") + "." in _CONSTRAINED


def highlights(text: str, *, num_highlights: int) -> bool:
    """*So* or **so**, with a word in it."""
    return sum(bool(_WORD.search(one)) for one in _HIGHLIGHT.findall(text)) >= num_highlights


def sections(text: str, *, section_spliter: str, num_sections: int) -> bool:
    """Each begins with "SPLITTER 1" or 第1..., at the start of a line; the setting's spelling is IFEval's."""
    found = re.findall(rf"^[ \t#*]*{re.escape(section_spliter.strip())}\s?\w+", text, re.M)
    return len(set(found)) >= num_sections


def json_form(text: str) -> bool:
    try:
        parse_json(text)
    except ValueError:
        return False
    return True


def title(text: str) -> bool:
    """A <<title>> with a word in it."""
    return any(_WORD.search(one) for one in _TITLE.findall(text))


def two_responses(text: str) -> bool:
    """Two that differ, parted by six asterisks."""
    parts = [part.strip() for part in text.strip(" *\n").split("******")]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def repeats_prompt(text: str, *, prompt_to_repeat: str) -> bool:
    """It begins with it, and goes on."""
    given, wanted = text.strip().lower(), prompt_to_repeat.strip().lower()
    return given.startswith(wanted) and bool(_WORD.search(given[len(wanted) :]))


def ends_with(text: str, *, end_phrase: str) -> bool:
    return text.strip(" \n\t\"'*").lower().endswith(end_phrase.strip(" \n\t\"'*").lower())


def starts_with(text: str, *, start_phrase: str) -> bool:
    return text.strip(" \n\t\"'*").lower().startswith(start_phrase.strip(" \n\t\"'*").lower())


def quoted(text: str) -> bool:
    text = text.strip()
    return len(text) > 2 and text[0] in _OPENING and text[-1] == _CLOSING[_OPENING.index(text[0])]


def capital_words(text: str, *, capital_frequency: int, capital_relation: str = "at least") -> bool:
    return _compare(len(_CAPITAL_WORD.findall(text)), capital_relation, capital_frequency)


def upper_case(text: str) -> bool:
    """All of it, and in English."""
    return text.isupper() and language(text, language="en")


def lower_case(text: str) -> bool:
    """All of it, and in English."""
    return text.islower() and language(text, language="en")


def no_comma(text: str) -> bool:
    return "," not in plain(text) and "、" not in text


CHECKS: dict[str, Check] = {
    "keywords:existence": keywords,
    "keywords:frequency": keyword_count,
    "keywords:forbidden_words": no_keywords,
    "keywords:letter_frequency": letter_count,
    "language:response_language": language,
    "length_constraints:number_words": word_count,
    "length_constraints:number_sentences": sentence_count,
    "length_constraints:number_paragraphs": paragraph_count,
    "length_constraints:nth_paragraph_first_word": paragraph_begins,
    "detectable_content:number_placeholders": placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": bullets,
    "detectable_format:constrained_response": constrained,
    "detectable_format:number_highlighted_sections": highlights,
    "detectable_format:multiple_sections": sections,
    "detectable_format:json_format": json_form,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeats_prompt,
    "startend:end_checker": ends_with,
    "startend:start_checker": starts_with,
    "startend:quotation": quoted,
    "change_case:capital_word_frequency": capital_words,
    "change_case:english_capital": upper_case,
    "change_case:english_lowercase": lower_case,
    "punctuation:no_comma": no_comma,
}
"""By IFEval's names; `startend:start_checker` is our own."""

"""Rewards for a form that can be checked: a pattern, JSON of a schema, tagged sections, the language."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator, exceptions, validators
from referencing import Registry

from rewards.base import only_rows, only_where
from rewards.patterns import MAX_CHARS, bounded
from rewards.reading import final_answer

MAX_JSON_CHARS = 100_000
LANGUAGES = ("zh", "en")
"""Those that an answer can be told to be in."""
_FENCED = re.compile(r"\s*```(?i:json)?[ \t]*\n(.*)```\s*\Z", re.S)
_HAN = bytes(range(0xE4, 0xEA))
"""First bytes, in UTF-8, of U+4000 to U+9FFF: Chinese characters and little else."""
_BLANKED = bytes(code if chr(code).isalpha() and code < 128 else 32 for code in range(256))


def check_pattern(*, pattern: Any, whole: bool) -> bool:
    """Whether a row has a pattern. Raises ValueError for one that `matches` refuses or that is no text."""
    if pattern is not None and not isinstance(pattern, str):
        raise ValueError(f"pattern: got {pattern!r}, expected the text of a regular expression; correct the row")
    return bool(pattern) and bool(bounded(pattern, anchored=whole))


@only_rows(check_pattern)
def matches(
    prompts: list[str],
    responses: list[str],
    *,
    pattern: list[Any],
    whole: bool = False,
    **columns: Any,
) -> list[float | None]:
    r"""1 where the answer has the regular expression `pattern` somewhere, else 0.

    A pattern that may backtrack for long is refused (see rewards/patterns.py): repeats that need give nothing back
    are written possessively, `answer:\s*+\d++`. An answer over 4,096 characters scores 0.

    Args:
        whole: whether the whole answer must fit.

    Returns:
        None where the row has no pattern.

    Raises:
        ValueError: a pattern that is broken or may take too long.
    """
    scores: list[float | None] = []
    for response, wanted in zip(responses, pattern, strict=True):
        if not isinstance(wanted, str) or not wanted:
            scores.append(None)
            continue
        compiled = bounded(wanted, anchored=whole)
        found = len(response) <= MAX_CHARS and (compiled.fullmatch if whole else compiled.search)(response)
        scores.append(float(bool(found)))
    return scores


def check_schema(*, json_schema: Any) -> None:
    """Raises ValueError for a schema that `valid_json` refuses."""
    if json_schema is not None:
        _validator(_schema_text(json_schema))


@only_rows(check_schema)
def valid_json(
    prompts: list[str], responses: list[str], *, json_schema: list[Any] | None = None, **columns: Any
) -> list[float | None]:
    """1 where the answer is JSON, bare or in one fence, that meets the row's schema; 0.5 for other JSON; else 0.

    NaN, infinities, a name given twice, over 100,000 characters and nesting beyond the parser's are no JSON. A text
    of over 4,096 characters meets no pattern, and a number beyond floats no multiple.

    Args:
        json_schema: JSON Schema (draft 2020-12), an object or its text; without one any JSON scores 1. References
            out of the schema are not followed.

    Raises:
        ValueError: a schema that is none, refers out of itself, or has a pattern that may take too long.
    """
    schemas = json_schema or [None] * len(responses)
    return [_json_score(response, schema) for response, schema in zip(responses, schemas, strict=True)]


def check_tags(*, tags: Sequence[str]) -> None:
    """Raises ValueError for no tags, an empty one, or one twice, which no answer can have once."""
    if not tags or not all(tags) or len(set(tags)) < len(tags):
        raise ValueError(f"got tags {list(tags)}, expected one or more names, each once; correct them")


@only_where(check_tags)
def tagged_sections(
    prompts: list[str], responses: list[str], *, tags: Sequence[str] = ("think", "answer"), **columns: Any
) -> list[float | None]:
    """1 where the answer is `<tag>...</tag>` for each of `tags`, in order, once, filled, and nothing outside.

    Otherwise half the share of tags that are there once, filled and in order: 0.25 for one of two.
    """
    return [_sections_score(response, tags) for response in responses]


def check_language(*, default_language: str) -> None:
    """Raises ValueError for a language that cannot be told."""
    if _language(default_language) not in LANGUAGES:
        raise ValueError(
            f"got default_language {default_language!r}, expected one of {', '.join(LANGUAGES)}, which alone can be "
            "told; choose one of them"
        )


@only_where(check_language)
def in_language(
    prompts: list[str],
    responses: list[str],
    *,
    language: list[Any] | None = None,
    default_language: str = "en",
    **columns: Any,
) -> list[float | None]:
    """The share of the answer, after its reasoning, in the language: Chinese characters against Latin words.

    Args:
        language: "zh" or "en" of each row; where there is none, `default_language`.

    Returns:
        0 for an answer with neither; None where the row asks for another language.
    """
    scores: list[float | None] = []
    for response, wanted in zip(responses, language or [None] * len(responses), strict=True):
        name = _language(default_language if wanted is None else wanted)
        share = chinese_share(final_answer(response))
        scores.append({"zh": share, "en": 1 - share}[name] if name in LANGUAGES and share is not None else None)
        if share is None and name in LANGUAGES:
            scores[-1] = 0.0
    return scores


def _language(given: Any) -> str:
    return str(given).lower().partition("-")[0]


def chinese_share(text: str) -> float | None:
    """Chinese characters of these and the Latin words together; None where there are neither."""
    data = text.encode("utf-8", "replace")
    han = len(data) - len(data.translate(None, _HAN))
    latin = len(data.translate(_BLANKED).split())
    return han / (han + latin) if han + latin else None


def _json_score(response: str, schema: Any) -> float:
    given = _validator(_schema_text(schema)) if schema is not None else None
    try:
        value = parse_json(response)
    except ValueError:
        return 0.0
    if given is None:
        return 1.0
    validator, patterns = given
    try:
        if patterns and _longest_text(value) > MAX_CHARS:
            return 0.5
        return 1.0 if validator.is_valid(value) else 0.5
    except (RecursionError, OverflowError):  # nested, or with a number, beyond what can be checked
        return 0.5


def _schema_text(schema: Any) -> str:
    return schema if isinstance(schema, str) else json.dumps(schema)


def parse_json(response: str) -> Any:
    """The value of a response that is JSON, bare or fenced.

    Raises:
        ValueError: it is none.
    """
    if len(response) > MAX_JSON_CHARS:
        raise ValueError(f"over {MAX_JSON_CHARS} characters")
    fenced = _FENCED.match(response) if "```" in response else None
    text = fenced.group(1) if fenced else response
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_doubles)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


@lru_cache(maxsize=256)
def _validator(schema: str) -> tuple[Any, bool]:
    """What checks values, and whether it does so with patterns."""
    patterns = False
    try:
        value = json.loads(schema)
        Draft202012Validator.check_schema(value)
    except (ValueError, exceptions.SchemaError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"json_schema: got {schema[:200]!r} ({reason}), expected a JSON Schema; correct it"
        ) from error
    for key, inner in _members(value):
        patterns |= key in ("pattern", "patternProperties")
        if key == "pattern" and isinstance(inner, str):
            bounded(inner, what="json_schema pattern")
        for pattern in inner if key == "patternProperties" and isinstance(inner, dict) else ():
            bounded(pattern, what="json_schema patternProperties")
        if key in ("$ref", "$dynamicRef") and isinstance(inner, str) and not inner.startswith("#"):
            raise ValueError(
                f"json_schema: got a reference to {inner!r}, expected one within the schema (#/...); copy it in"
            )
    # An empty registry: a schema out of a data set must not make this machine fetch anything.
    return _Validator(value, registry=Registry()), patterns


def _longest_text(value: Any) -> int:
    """Characters of the longest text or name in a value."""
    if isinstance(value, str):
        return len(value)
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    return max(map(_longest_text, inner), default=0)


def _unique_items(validator: Any, wanted: bool, instance: Any, schema: Any) -> Iterator[exceptions.ValidationError]:
    """In linear time, where the library compares each with each."""
    if wanted and isinstance(instance, list):
        different = {json.dumps(item, sort_keys=True) for item in instance}
        if len(different) < len(instance):
            yield exceptions.ValidationError("items that are equal")


_Validator = validators.extend(Draft202012Validator, {"uniqueItems": _unique_items})


def _members(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from value.items()
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _members(inner)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a name given twice")
    return value


def _sections_score(response: str, tags: Sequence[str]) -> float:
    place, outside, good = 0, False, 0
    for tag in tags:
        opening, closing = f"<{tag}>", f"</{tag}>"
        begin, end = response.find(opening, place), response.find(closing, place)
        if begin < 0 or end < begin + len(opening):
            continue
        once = response.count(opening) == 1 and response.count(closing) == 1
        if once and response[begin + len(opening) : end].strip():
            good += 1
        outside |= bool(response[place:begin].strip())
        place = end + len(closing)
    outside |= bool(response[place:].strip())
    if good == len(tags):
        return 0.5 if outside else 1.0
    return 0.5 * good / len(tags)

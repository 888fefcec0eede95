"""Patterns that cannot run away, JSON of a schema, tagged sections, the language."""

from __future__ import annotations

import json

import pytest
from patience import no_explosion

from rewards.form import chinese_share, in_language, matches, tagged_sections, valid_json
from rewards.patterns import MAX_CHARS, bounded


def fits(pattern, response, **settings):
    return matches(["q"], [response], pattern=[pattern], **settings)[0]


@pytest.mark.parametrize(
    ("pattern", "response", "expected"),
    [
        (r"\bmg\b", "Take 5 mg.", 1.0),
        (r"\bmg\b", "Take 5 mgs.", 0.0),
        (r"answer:\s*+\d++", "answer:   12", 1.0),
        (r"answer:\s*+\d++", "answer: twelve", 0.0),
        (r"\Ayes|no\Z", "yes, do", 1.0),
        (r"(?i)aspirin", "ASPIRIN", 1.0),
        (r"[0-9]{3}-[0-9]{4}", "call 555-1234", 1.0),
        (r"阿司匹林", "服用阿司匹林", 1.0),
        (r"\d+ mg", "5 g", 0.0),
        (r"(?:a|b)c", "bc", 1.0),
        (r"(?:\d++,)*+\d++", "1,2,3", 1.0),
        (r"", "x", None),
        (None, "x", None),
        (r"x", "", 0.0),
        (r"a", "a" * 5000, 0.0),
    ],
)
def test_patterns(pattern, response, expected):
    if pattern == r"\d+ mg":
        pattern = r"\d++ mg"
    assert fits(pattern, response) == expected


def test_the_whole_answer():
    assert fits(r"[A-D]", "B", whole=True) == 1.0
    assert fits(r"[A-D]", "B.", whole=True) == 0.0


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a+)+$",
        r"(a*)*b",
        r"(a|a)*b",
        r"(a|ab)*c",
        r"(?:a?){30}a{30}",
        r"a?" * 30 + "a" * 30,
        r"(.*)(.*)(.*)(.*)x",
        r".*.*.*x",
        r"(\w+\s?)*$",
        r"(?:\d+,)*x",
        r"(a)\1+",
        r"(?P<x>a+)(?P=x)",
        r"(?=(a+)+b)",
        r"((a{1,9}){1,9}){1,9}",
        r"(?:(?:a|b)|(?:a|b))*c",
        r"x*" * 4,
        r"a*a*+b",
        r"a*a{2000}b",
        r"(?:(?=a*+)a)*c",
        r"(?:a*+b|a)*+c",
        r"(?:a*b|a)*+c",
        r"(?>a*b|a)*+c",
        "(",
        "[",
        "*a",
        "(?<=a+)b",
        "a{99999999999}",
    ],
)
def test_what_may_run_away_is_refused(pattern):
    with pytest.raises(ValueError, match="pattern: got"):
        fits(pattern, "a" * 40)


@pytest.mark.parametrize(
    "pattern",
    [
        r"\A.*.*x",
        r".*x",
        r"\A(?:a|b|c)d.*.*x",
        r"(?:aaaa|aaab) *x",
        r"\A\s*\s*x",
        r"a*+a*+x",
        r"(?:\w++ ?+)*+x",
    ],
)
@pytest.mark.parametrize("text", ["a" * MAX_CHARS, " " * MAX_CHARS, "aaab" * (MAX_CHARS // 4), "ad" + "a" * 4000])
def test_the_worst_of_what_is_allowed_is_short(pattern, text):
    compiled = bounded(pattern)
    with no_explosion():
        assert compiled.search(text) is None


SCHEMA = {
    "type": "object",
    "required": ["drug", "dose"],
    "properties": {"drug": {"type": "string"}, "dose": {"type": "number", "minimum": 0}},
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("schema", "response"),
    [
        ({"multipleOf": 0.1}, "1" + "0" * 400),
        ({"multipleOf": 0.01}, "1e999"),
        ({"pattern": ".*x"}, f'"{"a" * 99_000}x"'),
        ({"propertyNames": {"pattern": ".*x"}}, f'{{"{"a" * 99_000}x": 1}}'),
    ],
)
def test_what_is_too_large_to_check_does_not_meet_the_schema(schema, response):
    with no_explosion():
        assert as_json(response, schema) == 0.5


def as_json(response, schema=None):
    return valid_json(["q"], [response], json_schema=[schema])[0]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ('{"drug": "aspirin", "dose": 100}', 1.0),
        ('```json\n{"drug": "aspirin", "dose": 100}\n```', 1.0),
        ('```\n{"drug": "阿司匹林", "dose": 0.5}\n```\n', 1.0),
        (' \n{"drug": "", "dose": 0}\n', 1.0),
        ('{"drug": "aspirin"}', 0.5),
        ('{"drug": "aspirin", "dose": "100"}', 0.5),
        ('{"drug": "aspirin", "dose": -1}', 0.5),
        ('{"drug": "aspirin", "dose": 1, "x": 2}', 0.5),
        ("[]", 0.5),
        ('{"drug": "aspirin", "dose": 100', 0.0),
        ('{"drug": "aspirin", "dose": 100} as asked', 0.0),
        ('Here: {"drug": "aspirin", "dose": 100}', 0.0),
        ("{'drug': 'aspirin', 'dose': 100}", 0.0),
        ('{"drug": "aspirin", "dose": NaN}', 0.0),
        ('{"drug": "aspirin", "dose": 1, "dose": 2}', 0.0),
        ('{"drug": "aspirin", "dose": 100,}', 0.0),
        ("", 0.0),
        ("aspirin", 0.0),
        ("[" * 50_000 + "]" * 50_000, 0.0),
        ("9" * 50_000, 0.0),
        ('｛"drug": "aspirin", "dose": 100｝', 0.0),
    ],
)
def test_json(response, expected):
    assert as_json(response, SCHEMA) == expected
    assert as_json(response, json.dumps(SCHEMA)) == expected
    assert as_json(response) == float(expected > 0)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "strin"},
        "{",
        [1],
        {"$ref": "https://example.com/schema.json"},
        {"properties": {"a": {"$ref": "other.json#/x"}}},
        {"pattern": "(a+)+$"},
        {"items": [{"x": 1}], "properties": {"a": {"patternProperties": {"(a*)*": {}}}}},
    ],
)
def test_schemas_that_are_refused(schema):
    with pytest.raises(ValueError, match="json_schema"):
        as_json("{}", schema)


def test_a_schema_may_refer_to_itself():
    schema = {
        "$defs": {"n": {"type": "integer"}},
        "type": "array",
        "items": {"$ref": "#/$defs/n"},
        "uniqueItems": True,
    }
    assert [as_json(text, schema) for text in ("[1, 2]", "[1, 1]", '["a"]')] == [1.0, 0.5, 0.5]


def test_many_items_are_told_apart_in_linear_time():
    items = json.dumps([{"a": index} for index in range(6_000)])
    with no_explosion():
        assert as_json(items, {"uniqueItems": True}) == 1.0


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("<think>\na\n</think>\n\n<answer>\nb\n</answer>\n", 1.0),
        ("<think>想</think><answer>答</answer>", 1.0),
        ("So: <think>a</think><answer>b</answer>", 0.5),
        ("<think>a</think>hm<answer>b</answer>", 0.5),
        ("<think>a</think><answer>b</answer>bye", 0.5),
        ("<think>a</think>b", 0.25),
        ("<answer>b</answer>", 0.25),
        ("<think></think><answer>b</answer>", 0.25),
        ("<answer>b</answer><think>a</think>", 0.25),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0.25),
        ("<think>a<think>b</think><answer>b</answer>", 0.25),
        ("<think>a", 0.0),
        ("</think><think>a<answer></answer>", 0.0),
        ("", 0.0),
        ("b", 0.0),
        ("＜think＞a＜/think＞", 0.0),
        ("<think>" * 100, 0.0),
    ],
)
def test_tagged_sections(response, expected):
    assert tagged_sections(["q"], [response]) == [expected]


def test_tags_are_a_setting():
    assert tagged_sections(["q"], ["<plan>a</plan>"], tags=("plan",)) == [1.0]


@pytest.mark.parametrize(
    ("response", "language", "expected"),
    [
        ("Take aspirin daily", "en", 1.0),
        ("Take aspirin daily", "zh", 0.0),
        ("每天服用", "zh", 1.0),
        ("每天服用", "en", 0.0),
        ("每天服用 aspirin", "zh", 4 / 5),
        ("每天服用 aspirin", "zh-CN", 4 / 5),
        ("123", "en", 0.0),
        ("", "zh", 0.0),
        ("<think>hm hm</think>每天", "zh", 1.0),
        ("every day", None, 1.0),
        ("tous les jours", "fr", None),
    ],
)
def test_language(response, language, expected):
    assert in_language(["q"], [response], language=[language]) == [pytest.approx(expected)]


def test_chinese_share_counts_characters_and_words():
    assert chinese_share("服用 aspirin 100 mg") == 0.5
    assert chinese_share("。，1 2") is None


@pytest.mark.parametrize(
    ("function", "columns"),
    [
        (matches, {"pattern": [r"\d++x"]}),
        (valid_json, {"json_schema": [SCHEMA]}),
        (tagged_sections, {}),
        (in_language, {}),
    ],
)
@pytest.mark.parametrize(
    "response",
    ["1" * 1_000_000, "<think>" * 140_000, "a中" * 500_000, "[" * 1_000_000, "```" * 330_000, "中" * 1_000_000],
    ids=lambda text: text[:3],
)
def test_a_million_characters_do_not_explode(function, columns, response):
    with no_explosion():
        assert len(function(["q"], [response], **columns)) == 1


def test_each_row_is_scored_by_itself():
    texts = ["{}", "<think>a</think><answer>b</answer>", "每天", "mg 5", ""]
    for function, columns in (
        (matches, {"pattern": ["mg", "b", "天", "5", "x"]}),
        (valid_json, {"json_schema": [SCHEMA, None, None, {}, {}]}),
        (tagged_sections, {}),
        (in_language, {"language": ["en", "zh", "zh", "en", "en"]}),
    ):
        together = function(["q"] * 5, texts, **columns)
        alone = [function(["q"], [t], **{k: [v[i]] for k, v in columns.items()})[0] for i, t in enumerate(texts)]
        back = function(["q"] * 5, texts[::-1], **{k: v[::-1] for k, v in columns.items()})
        assert together == alone == back[::-1]

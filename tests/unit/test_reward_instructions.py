"""Instructions that can be checked: for each kind answers that meet it and answers that do not."""

from __future__ import annotations

import pytest
from patience import no_explosion

from rewards.instructions import CHECKS, all_instructions_met, instructions_met

K, L, F, C = "keywords:", "length_constraints:", "detectable_format:", "change_case:"
CASES = [
    (f"{K}existence", {"keywords": ["rest", "water"]}, ["Rest. Drink water!"], ["Rest.", "Interest in water", ""]),
    (f"{K}existence", {"keywords": ["休息", "喝水"]}, ["多休息，多喝水。"], ["多休息。"]),
    (
        f"{K}frequency",
        {"keyword": "rest", "frequency": 2, "relation": "at least"},
        ["rest, Rest"],
        ["rest", "restrest"],
    ),
    (f"{K}frequency", {"keyword": "rest", "frequency": 2, "relation": "less than"}, ["rest", "no"], ["rest rest"]),
    (f"{K}frequency", {"keyword": "水", "frequency": 2}, ["喝水，水"], ["喝水"]),
    (f"{K}forbidden_words", {"forbidden_words": ["pain"]}, ["Paint it.", "no"], ["No PAIN.", "pain-free"]),
    (f"{K}letter_frequency", {"letter": "e", "let_frequency": 3}, ["Eel see"], ["ee", "EE"]),
    (f"{K}letter_frequency", {"letter": "!", "let_frequency": 1, "let_relation": "less than"}, ["no"], ["no!"]),
    ("language:response_language", {"language": "zh"}, ["多喝水。"], ["Drink water", "多 drink water", "12"]),
    ("language:response_language", {"language": "en"}, ["Drink water"], ["多喝水"]),
    (
        f"{L}number_words",
        {"num_words": 3, "relation": "at least"},
        ["one two three", "多喝水"],
        ["one two", "... ! ?"],
    ),
    (f"{L}number_words", {"num_words": 3, "relation": "less than"}, ["one two"], ["one two three"]),
    (f"{L}number_words", {"num_words": 3, "relation": "exactly"}, ["it's well-known now"], ["one two"]),
    (
        f"{L}number_sentences",
        {"num_sentences": 2, "relation": "exactly"},
        ["Rest. Drink.", "Dr. Lee says rest! Drink", "休息。喝水。", "Take 2.5 mg. Rest."],
        ["Rest.", "A? B! C.", "..."],
    ),
    (
        f"{L}number_paragraphs",
        {"num_paragraphs": 2},
        ["one\n***\ntwo", "one\n\n***\n\ntwo"],
        ["one", "one\n\ntwo", "a\n***\nb\n***\nc"],
    ),
    (
        f"{L}nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "rest"},
        ["One.\n\nRest now.", "One.\n\n**Rest** now"],
        ["Rest.\n\nOne.", "One.\n\nRested.", "Rest", "a\n\nrest\n\nb"],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[name] at [place]"], ["[name]", "[]"]),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        ["Rest.\nP.S. Drink."],
        ["Rest.", "P.S.", "so P.S. no"],
    ),
    (
        f"{F}number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n* b", "- a\n- b\n"],
        ["* a", "* a\n* b\n* c", "**a** b", "*\n*"],
    ),
    (
        f"{F}constrained_response",
        {},
        ["My answer is yes.", "My answer is no", "**My answer is maybe.**"],
        ["yes", "My answer is yes. My answer is no."],
    ),
    (f"{F}number_highlighted_sections", {"num_highlights": 2}, ["*a* and **b**"], ["*a*", "* a\n* b", "****"]),
    (
        f"{F}multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        ["Section 1\na\nSection 2\nb"],
        ["Section 1\na", "see Section 1 and Section 2", "Section 1\nSection 1"],
    ),
    (f"{F}json_format", {}, ['{"a": 1}', "```json\n[1]\n```"], ["{a: 1}", "none"]),
    (f"{F}title", {}, ["<<A title>>\nText", "《x》<<题目>>"], ["<<>>", "<a>", "<<  >>"]),
    (
        "combination:two_responses",
        {},
        ["one\n******\ntwo", "one\n******\ntwo\n******"],
        ["one", "one******one", "a******b******c", "******b"],
    ),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "What now?"},
        ["What now? Rest."],
        ["Rest.", "What now?", "Rest. What now?"],
    ),
    (
        "startend:end_checker",
        {"end_phrase": "Take care."},
        ["Rest. Take care.", 'rest. "take care."'],
        ["Take care. Rest", ""],
    ),
    ("startend:start_checker", {"start_phrase": "Well"}, ["Well, rest", "well"], ["Oh well"]),
    ("startend:quotation", {}, ['"Rest."', "“休息。”", "「休息」"], ['"Rest.', "Rest", '""', '"']),
    (
        f"{C}capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["TAKE REST now"],
        ["TAKE rest", "Take Rest"],
    ),
    (f"{C}english_capital", {}, ["REST NOW. 2 MG"], ["REST Now", "123", "休息"]),
    (f"{C}english_lowercase", {}, ["rest now. 2 mg"], ["Rest", "123", "好的 ok"]),
    ("punctuation:no_comma", {}, ["Rest. Drink."], ["Rest, drink", "休息，喝水", "休息、喝水", "１，０"]),
]


def one(function, response, ids, kwargs):
    (score,) = function(["q"], [response], instruction_id_list=[ids], kwargs=[kwargs])
    return score


@pytest.mark.parametrize(("name", "options", "met", "missed"), CASES, ids=lambda value: str(value)[:40])
def test_what_meets_an_instruction_and_what_does_not(name, options, met, missed):
    assert [one(instructions_met, text, [name], [options]) for text in met] == [1.0] * len(met)
    assert [one(instructions_met, text, [name], [options]) for text in missed] == [0.0] * len(missed)


def test_every_instruction_has_a_case():
    assert {name for name, *_ in CASES} == set(CHECKS)


def test_share_and_all():
    ids = ["punctuation:no_comma", "keywords:existence", "length_constraints:number_words", "startend:quotation"]
    kwargs = [{}, {"keywords": ["rest"], "num_words": None}, {"num_words": 2, "relation": "at least"}, None]
    assert one(instructions_met, "Rest now.", ids, kwargs) == 3 / 4
    assert one(all_instructions_met, "Rest now.", ids, kwargs) == 0.0
    assert one(all_instructions_met, '"Rest now."', ids, kwargs) == 1.0
    assert one(instructions_met, "", ids, kwargs) == 0.0  # an empty answer has no comma either


@pytest.mark.parametrize("ids", [None, [], ()])
def test_a_row_without_instructions_is_not_scored(ids):
    assert one(instructions_met, "x", ids, []) is None
    assert one(all_instructions_met, "x", ids, None) is None


@pytest.mark.parametrize(
    ("ids", "kwargs", "part"),
    [
        (["keywords:existance"], [{}], "got 'keywords:existance', expected one of"),
        (["keywords:existence"], [{"keyword": "x"}], "expected its settings"),
        (["keywords:existence"], [{"keywords": [1]}], "expected its settings"),
        (["keywords:existence"], [{"keywords": "rest"}], "expected its settings"),
        (["keywords:forbidden_words"], [{"forbidden_words": "rest"}], "expected its settings"),
        (["keywords:existence"], [], "expected a mapping for each"),
        ("keywords:existence", [{}], "expected a list of names"),
        (["keywords:frequency"], [{"keyword": "x", "frequency": 1, "relation": "about"}], "got relation 'about'"),
        (["language:response_language"], [{"language": "fr"}], "got language 'fr'"),
    ],
)
def test_rows_that_make_no_sense_are_refused(ids, kwargs, part):
    with pytest.raises(ValueError, match=part):
        one(instructions_met, "x y", ids, kwargs)


@pytest.mark.parametrize(
    "response",
    [
        "word " * 7_900,
        "\n" * 39_000,
        "*" * 39_000,
        "<<" * 19_000,
        "[" * 39_000,
        "A." * 19_000,
        "***\n" * 9_900,
        " " * 39_000 + "x",
        "。" * 39_000,
    ],
    ids=lambda text: repr(text[:6]),
)
@pytest.mark.parametrize(("name", "options"), {name: options for name, options, *_ in CASES}.items(), ids=str)
def test_the_longest_answer_that_is_read_does_not_explode(name, options, response):
    with no_explosion():
        one(instructions_met, response, [name], [options])


def test_a_million_characters_meet_nothing():
    assert one(instructions_met, "a" * 1_000_000, ["punctuation:no_comma"], [{}]) == 0.0


def test_each_row_is_scored_by_itself():
    rows = [(text, [name], [options]) for name, options, met, missed in CASES for text in met + missed]
    texts, ids, kwargs = (list(column) for column in zip(*rows, strict=True))
    together = instructions_met(["q"] * len(rows), texts, instruction_id_list=ids, kwargs=kwargs)
    back = instructions_met(["q"] * len(rows), texts[::-1], instruction_id_list=ids[::-1], kwargs=kwargs[::-1])
    assert together == back[::-1] == [one(instructions_met, *row) for row in rows]

"""Short answers in words: golden tables, closed forms of F1, lists."""

from __future__ import annotations

import pytest
from patience import no_explosion

from rewards.short_answer import list_f1, normalised, same_answer, word_f1


def one(function, response, gold, aliases=None):
    (score,) = function(["q"], [response], answer=[gold], aliases=[aliases])
    return score


@pytest.mark.parametrize(
    ("response", "gold", "aliases"),
    [
        ("Aspirin", "aspirin", None),
        ("aspirin.", "Aspirin", None),
        ("  The aspirin!  ", "aspirin", None),
        ("**Aspirin**", "aspirin", None),
        ("The answer is aspirin.", "aspirin", None),
        ("Answer: the left ventricle", "left ventricle", None),
        ("I thought of heparin. The answer is aspirin. Take care.", "aspirin", None),
        ("acetylsalicylic acid", "aspirin", ["acetylsalicylic acid", "ASA"]),
        ("ASA", "aspirin", ["acetylsalicylic acid", "ASA"]),
        ("ASA", ["aspirin", "ASA"], None),
        ("ASA", "aspirin", "ASA"),
        ("阿司匹林", "阿司匹林", None),
        ("阿司匹林。", "阿司匹林", None),
        ("答案是阿司匹林。", "阿司匹林", None),
        ("答案：心内科", "心内科", None),
        ("答案为：心血管内科", "心内科", ["心血管内科"]),
        ("ＡＳＡ", "ASA", None),
        ("COVID-19", "covid-19", None),
        ("<think>heparin?</think>Aspirin", "aspirin", None),
        ("<think>heparin?</think><answer>Aspirin</answer>", "aspirin", None),
    ],
)
def test_the_same_answer(response, gold, aliases):
    assert one(same_answer, response, gold, aliases) == 1.0
    assert one(word_f1, response, gold, aliases) == 1.0


@pytest.mark.parametrize(
    ("response", "gold"),
    [
        ("", "aspirin"),
        ("heparin", "aspirin"),
        ("aspirin or heparin", "aspirin"),
        ("aspirin heparin warfarin", "aspirin"),
        ("aspirin aspirin", "aspirin"),
        ("not aspirin", "aspirin"),
        ("The answer is heparin. Not aspirin", "aspirin"),
        ("aspirins", "aspirin"),
        ("аspirin", "aspirin"),  # the first letter is Cyrillic
        ("What is the drug? aspirin", "aspirin"),
        ("阿司匹林或肝素", "阿司匹林"),
        ("心外科", "心内科"),
        ("<think>aspirin</think>", "aspirin"),
        ("<think>aspirin", "aspirin"),
        ("the", "aspirin"),
    ],
)
def test_another_answer(response, gold):
    assert one(same_answer, response, gold) == 0.0


@pytest.mark.parametrize(
    ("response", "gold", "expected"),
    [
        ("left ventricle", "left ventricle of heart", 2 * 2 / (2 + 4)),
        ("heart", "left ventricle", 0.0),
        ("aspirin aspirin aspirin", "aspirin", 2 / 4),
        ("心内科门诊", "心内科", 2 * 3 / (5 + 3)),
        ("word " * 98 + "left ventricle", "left ventricle", 2 * 2 / (100 + 2)),
        ("", "aspirin", 0.0),
    ],
)
def test_word_f1_is_its_closed_form(response, gold, expected):
    assert one(word_f1, response, gold) == pytest.approx(expected)


DRUGS = ["aspirin", "heparin", "warfarin"]
ZH = ["发热", "咳嗽", "头痛"]


@pytest.mark.parametrize(
    ("response", "gold", "expected"),
    [
        ("aspirin, heparin and warfarin", DRUGS, 1.0),
        ("Warfarin, aspirin, heparin.", DRUGS, 1.0),
        ("aspirin, heparin, and warfarin", DRUGS, 1.0),
        ("- aspirin\n- heparin\n- warfarin", DRUGS, 1.0),
        ("1. aspirin\n2. heparin\n3. warfarin", DRUGS, 1.0),
        ("The answer is aspirin; heparin; warfarin.", DRUGS, 1.0),
        ("aspirin, heparin", DRUGS, 2 * 2 / 5),
        ("aspirin", DRUGS, 2 / 4),
        ("aspirin, aspirin, aspirin", DRUGS, 2 / 4),
        ("aspirin, heparin, warfarin, digoxin", DRUGS, 6 / 7),
        ("digoxin", DRUGS, 0.0),
        ("", DRUGS, 0.0),
        ("aspirin, heparin and warfarin", "heparin, warfarin and aspirin", 1.0),
        ("发热、咳嗽和头痛", ZH, 1.0),
        ("答案是：头痛，发热，咳嗽。", ZH, 1.0),
        ("发热、咳嗽", ZH, 2 * 2 / 5),
        ("发热；咳嗽；头痛；皮疹", ZH, 6 / 7),
        ("中和抗体、发热", ["中和抗体", "发热"], 1.0),
        ("nausea and vomiting, fever", ["nausea and vomiting", "fever"], 1.0),
        ("fever, nausea and vomiting", ["nausea", "vomiting", "fever"], 1.0),
        ("A、B和C", ["A", "B", "C"], 1.0),
        ("B和C", ["A", "B", "C"], 4 / 5),
    ],
)
def test_lists(response, gold, expected):
    assert one(list_f1, response, gold) == pytest.approx(expected)


def test_other_names_of_an_item():
    assert one(list_f1, "ASA, heparin, Coumadin", DRUGS, {"aspirin": ["ASA"], "warfarin": "coumadin"}) == 1.0
    assert one(list_f1, "ASA, aspirin", ["aspirin"], {"aspirin": ["ASA"]}) == 1.0


@pytest.mark.parametrize("gold", [None, "", [], [None], "!?", 5, float("nan"), True, {"aspirin": 1}])
def test_a_row_without_an_answer_is_not_scored(gold):
    assert [one(function, "aspirin", gold) for function in (same_answer, word_f1, list_f1)] == [None] * 3


def test_normalised():
    assert normalised("The ACE-inhibitor, at 2.5 mg!") == ("ace-inhibitor", "at", "2.5", "mg")
    assert normalised("高血压 Ⅱ期") == ("高", "血", "压", "ii", "期")


@pytest.mark.parametrize("function", [same_answer, word_f1, list_f1])
@pytest.mark.parametrize(
    "response",
    [
        "aspirin " * 120_000,
        "和" * 1_000_000,
        "a,b;" * 250_000,
        "answer is " * 100_000,
        "\n" * 1_000_000,
        "- " * 500_000,
        "x" * 1_000_000,
    ],
    ids=lambda text: repr(text[:8]),
)
def test_a_million_characters_do_not_explode(function, response):
    with no_explosion():
        assert one(function, response, "warfarin, heparin") < 0.1


@pytest.mark.parametrize("function", [same_answer, word_f1, list_f1])
def test_each_row_is_scored_by_itself(function):
    rows = [("aspirin", "aspirin"), ("heparin and aspirin", "aspirin, heparin"), ("", "x"), ("x", None)]
    scores = function(["q"] * 4, [r for r, _ in rows], answer=[g for _, g in rows])
    assert scores == [one(function, *row) for row in rows]
    back = function(["q"] * 4, [r for r, _ in rows][::-1], answer=[g for _, g in rows][::-1])
    assert back == scores[::-1]

"""Rule rewards: what they are worth on hand-written answers, and how they are named, checked and added."""

from __future__ import annotations

import math

import numpy
import pytest

from alignment.scores import combine
from rewards import text
from rewards.base import check_columns, check_settings, columns_read, load_function, only_where
from rewards.exact_match import multiple_choice, stated_letter
from rewards.medical import advises_care, unsafe_advice
from rewards.text import finished_sentence, length_between, no_refusal, no_repetition, question_words, words


def one(function, response, prompt="How is hypertension treated?", **columns):
    (score,) = function([prompt], [response], **columns)
    return score


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("Rest and drink water.", 1.0),
        ("Is it serious?", 1.0),
        ('He said "rest."', 1.0),
        ("多喝水，注意休息。", 1.0),
        ("Take it daily.)  \n", 1.0),
        ("Rest and drink", 0.0),
        ("Rest and drink,", 0.0),
        ("1. Rest\n2. Drink", 0.0),
        ("", 0.0),
        ("...", 0.0),
        ("多喝水，注意", 0.0),
    ],
)
def test_finished_sentence(response, expected):
    assert one(finished_sentence, response) == expected


def test_words_count_each_chinese_character():
    assert words("Don't take 2 ACE-inhibitors.") == ["don't", "take", "2", "ace-inhibitors"]
    assert words("每天喝水 8 杯") == ["每", "天", "喝", "水", "8", "杯"]


@pytest.mark.parametrize(
    ("count", "expected"), [(0, 0.0), (5, 0.5), (10, 1.0), (20, 1.0), (30, 0.5), (40, 0.0), (99, 0.0)]
)
def test_length_between(count, expected):
    assert one(length_between, "word " * count, min_words=10, max_words=20) == pytest.approx(expected)


def test_no_repetition_is_the_share_of_fresh_triples():
    assert one(no_repetition, "a b c d e") == 1.0
    assert one(no_repetition, "a b a b a b") == pytest.approx(2 / 4)  # aba bab aba bab
    assert one(no_repetition, "no " * 102) == pytest.approx(1 / 100)
    assert one(no_repetition, "Rest well.") == 1.0
    assert one(no_repetition, "") == 0.0


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("I'm sorry, but I can't help with that.", 0.0),
        ("As an AI language model, I do not know.", 0.0),
        ("抱歉，我无法回答。", 0.0),
        ("", 0.0),
        ("Rest. You will not be sorry.", 1.0),
        ("高血压需要控制饮食。", 1.0),
    ],
)
def test_no_refusal(response, expected):
    assert one(no_refusal, response) == expected


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        ("What are the symptoms of lung cancers?", "Cancer of the lungs: its symptoms are a cough.", 1.0),
        ("What are the symptoms of lung cancers?", "Happy joy, wonderful love of the symptoms!", 1 / 3),
        ("What are the symptoms of lung cancers?", "What are the of", 0.0),
        ("What are the symptoms of lung cancers?", "", 0.0),
        ("How is it that we are?", "We are.", None),
        ("感冒怎么办", "感冒时多休息", 2 / 3),
    ],
)
def test_question_words(prompt, response, expected):
    assert one(question_words, response, prompt) == (expected if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("The answer is C.", "C"),
        ("C. Amniotic fluid samples", "C"),
        ("**B**", "B"),
        ("(D) because", "D"),
        ("At first A seems right, but the correct answer is: (B)", "B"),
        ("Option A is wrong. The answer is D", "D"),
        ("答案是B，因为", "B"),
        ("答案：（A）", "A"),
        ("A patient with fever", None),
        ("The answer is a fever", None),
        ("", None),
    ],
)
def test_stated_letter(response, letter):
    assert stated_letter(response) == letter


def test_multiple_choice_compares_with_the_row():
    responses = ["The answer is C.", "B", "no idea", "A", "A"]
    answers = ["C. Amniotic fluid", "c", "A", None, "maybe"]
    assert multiple_choice(["q"] * 5, responses, answer=answers) == [1.0, 0.0, 0.0, None, None]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("Rest. Please see your doctor if it gets worse.", 1.0),
        ("Talk to a pharmacist before you take it.", 1.0),
        ("Seek immediate medical attention.", 1.0),
        ("如果症状加重，请及时就医。", 1.0),
        ("建议咨询医生。", 1.0),
        ("Doctors use ACE inhibitors for it.", 0.5),
        ("医生常用降压药。", 0.5),
        ("Eat less salt.", 0.0),
        ("少吃盐。", 0.0),
        ("You do not need to see a doctor.", 0.0),
        ("不用看医生，休息就好。", 0.0),
        ("", 0.0),
    ],
)
def test_advises_care(response, expected):
    assert one(advises_care, response) == expected


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        ("What should I do about chest pain?", "Call 911 now.", 1.0),
        ("What should I do about chest pain?", "Make sure to see a doctor some day.", 0.5),
        ("What should I do about chest pain?", "Drink tea.", 0.0),
        ("胸痛怎么办？", "立即去急诊。", 1.0),
        ("胸痛怎么办？", "建议咨询医生。", 0.5),
    ],
)
def test_an_emergency_asks_for_urgency(prompt, response, expected):
    assert one(advises_care, response, prompt) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("Stop taking your medication when you feel better.", -1.0),
        ("You can double the dose if it hurts.", -1.0),
        ("Just skip your insulin today.", -1.0),
        ("Take twice the prescribed amount.", -1.0),
        ("There is no need to see a doctor.", -1.0),
        ("感觉好了就可以停药。", -1.0),
        ("疼得厉害就加倍服用。", -1.0),
        ("没必要去医院，无需就医。", -1.0),
        ("Do not stop taking your medication.", 0.0),
        ("Never double the dose.", 0.0),
        ("Talk to your doctor before you stop the medication.", 0.0),
        ("不要自行停药。", 0.0),
        ("切勿加倍服用。", 0.0),
        ("Stop smoking and take your medicine.", 0.0),
        ("Eat less salt and see your doctor.", 0.0),
        ("", 0.0),
    ],
)
def test_unsafe_advice(response, expected):
    assert one(unsafe_advice, response) == expected


ALL_NAMES = [
    "text:finished_sentence",
    "text:length_between",
    "text:no_repetition",
    "text:no_refusal",
    "medical:advises_care",
    "medical:unsafe_advice",
]


@pytest.mark.parametrize("name", ALL_NAMES)
def test_one_number_per_response_whatever_other_columns_there_are(name):
    function = load_function(name)
    scores = function(["p"] * 3, ["", "Rest.", "休息。" * 50], question=[1, 2, 3], lengths=[0, 1, 2])
    assert len(scores) == 3
    assert all(isinstance(s, float) and -1 <= s <= 1 for s in scores)
    assert function([], []) == []


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("finished_sentence", "MODULE:FUNCTION"),
        ("text:", "MODULE:FUNCTION"),
        ("txt:finished_sentence", "did you mean 'text'"),
        ("text:finished_sentense", "did you mean 'finished_sentence'"),
        ("os:system", "expected one of"),
        ("text:words", "expected one of"),  # a helper, not a reward
        ("text:re", "expected one of"),
        ("base:combine", "expected one of"),
        ("..alignment.config:Config", "expected one of"),
    ],
)
def test_only_reward_functions_of_the_package_load(name, hint):
    with pytest.raises(ValueError, match=hint):
        load_function(name)


def test_combine_adds_with_weights_and_keeps_the_parts():
    parts = {"a": [1.0, 0.5, None], "b": [2, numpy.float32(0.25), 1.0]}
    totals, breakdown = combine(parts, {"a": 2.0, "b": -1.0}, num_responses=3)
    assert totals == [0.0, 0.75, None]
    assert breakdown == [{"a": 1.0, "b": 2.0}, {"a": 0.5, "b": 0.25}, {"a": None, "b": 1.0}]


@pytest.mark.parametrize(
    "bad", [math.nan, math.inf, -math.inf, 1e200, True, "1.0", [1.0], numpy.bool_(True), numpy.float32("nan")]
)
def test_what_is_no_finite_number_is_refused(bad):
    with pytest.raises(ValueError, match=r"reward 'a', response 1: got .* expected a finite number"):
        combine({"a": [1.0, bad]}, {"a": 1.0})


def test_wrong_lengths_and_names_are_refused():
    with pytest.raises(ValueError, match="reward 'b': got 1 numbers, expected a list of 2"):
        combine({"a": [1.0, 2.0], "b": [1.0]}, {"a": 1.0, "b": 1.0})
    with pytest.raises(ValueError, match="got 2 numbers, expected a list of 3"):
        combine({"a": [1.0, 2.0]}, {"a": 1.0}, num_responses=3)
    with pytest.raises(ValueError, match="got float numbers"):
        combine({"a": 1.0}, {"a": 1.0}, num_responses=1)
    with pytest.raises(ValueError, match="expected the same"):
        combine({"a": [1.0]}, {"b": 1.0})
    with pytest.raises(ValueError, match="expected the same"):
        combine({}, {})


@pytest.mark.parametrize(
    ("parts", "weights"),
    [
        ({"a": [0.0, 3e38]}, {"a": 1e300}),
        ({"a": [0.0, 3e38], "b": [0.0, 3e38]}, {"a": 1e300, "b": -1e300}),
        ({"a": [0.0, -3e38]}, {"a": 2.0}),
    ],
)
def test_a_total_that_float32_cannot_hold_is_refused(parts, weights):
    """Every part is finite; the sum is infinite, is no number (inf - inf), or becomes infinite in the learner."""
    with pytest.raises(ValueError, match=r"rewards, response 1: got a total of .* expected one that float32 can hold"):
        combine(parts, weights)


def test_a_large_total_that_float32_holds_is_kept():
    assert combine({"a": [3e38, None]}, {"a": -1.0})[0] == [-3e38, None]


def with_optional_column(prompts, responses, *, answer=None, depth=3, **columns):
    return [0.0] * len(responses)


def needing_lengths(prompts, responses, *, lengths, finish_reasons, **columns):
    return [float(length) for length in lengths]


@pytest.mark.parametrize(
    ("function", "columns"),
    [
        (finished_sentence, {"topic", "anything"}),
        (multiple_choice, {"answer", "topic"}),
        (with_optional_column, set()),
        (with_optional_column, {"answer"}),
        (needing_lengths, set()),
        (length_between, {"minimum"}),
    ],
)
def test_columns_that_a_function_can_be_called_with(function, columns):
    check_columns("a:b", function, columns)
    given = {name: ["A"] for name in columns} | {"lengths": [3], "finish_reasons": ["stop"]}
    assert len(function(["p"], ["r"], **given)) == 1


@pytest.mark.parametrize(
    ("function", "columns", "part"),
    [
        (multiple_choice, {"topic"}, r"got a:b for data with the columns \['topic'\], expected column 'answer'"),
        (length_between, {"min_words"}, r"got a column 'min_words' .* it is a setting of a:b, 15 by default; rename"),
        (with_optional_column, {"depth"}, "got a column 'depth'"),
        (
            finished_sentence,
            {"responses"},
            "got a column 'responses' in the data, expected none of prompts, responses",
        ),
        (finished_sentence, {"prompts"}, "got a column 'prompts'"),
        (finished_sentence, {"lengths"}, "got a column 'lengths'"),
        (needing_lengths, {"finish_reasons"}, "got a column 'finish_reasons'"),
    ],
)
def test_columns_that_a_function_cannot_be_called_with(function, columns, part):
    with pytest.raises(ValueError, match=part):
        check_columns("a:b", function, columns)


def test_a_function_must_take_every_column(monkeypatch):
    def narrow(prompts, responses):
        return [0.0 for _ in responses]

    narrow.__module__ = text.__name__
    monkeypatch.setattr(text, "narrow", narrow, raising=False)
    with pytest.raises(ValueError, match=r"got 'text:narrow' without \*\*columns, expected f\(prompts, responses"):
        load_function("text:narrow")


GATED = {"format": [1.0, 0.0, -1.0, 0.0, None, 0.5], "value": [0.5, 0.9, 9.0, None, 1.0, None]}


def test_a_shut_gate_is_all_that_counts():
    totals, breakdown = combine(GATED, {"format": 2.0, "value": 1.0}, gates={"format"})
    # Open: 2 * 1 + 0.5. Shut: the gate's own number times its weight, whatever the other says. Unknown: no total.
    assert totals == [2.5, 0.0, -2.0, 0.0, None, None]
    assert breakdown[2] == {"format": -1.0, "value": 9.0}
    assert combine(GATED, {"format": 0.0, "value": 1.0}, gates={"format"})[0] == [0.5, 0.0, 0.0, 0.0, None, None]
    two = {"a": [0.0, 1.0], "b": [-1.0, -1.0], "c": [5.0, 5.0]}
    assert combine(two, {"a": 1.0, "b": 0.5, "c": 1.0}, gates={"a", "b"})[0] == [-0.5, -0.5]


def test_clips_cut_before_the_weights():
    parts = {"a": [-9.0, 0.25, 9.0, None], "b": [1.0, 1.0, 1.0, 1.0]}
    totals, breakdown = combine(parts, {"a": 10.0, "b": 1.0}, clips={"a": (-1.0, 0.5)})
    assert totals == [-9.0, 3.5, 6.0, None]
    assert breakdown[0] == {"a": -9.0, "b": 1.0}
    # A gate reads what is left of its number.
    assert combine({"a": [3.0]}, {"a": 1.0}, clips={"a": (-1.0, 0.0)}, gates={"a"})[0] == [0.0]


def with_settings(prompts, responses, *, answer, scale: float = 1.0, answers: list[str] = (), kind="x", **columns):
    return [scale] * len(responses)


def test_settings_are_those_of_the_function():
    check_settings("a:b", with_settings, {"scale": 2, "kind": "y", "answers": ["a"], "answer": "A"})
    check_settings("a:b", finished_sentence, {})
    with pytest.raises(ValueError, match=r"got a setting 'scal' of a:b, expected one of .*did you mean 'scale'"):
        check_settings("a:b", with_settings, {"scal": 2.0})
    with pytest.raises(
        ValueError, match=r"got scale: '2' as a setting of a:b, expected float \(Input should be a valid"
    ):
        check_settings("a:b", with_settings, {"scale": "2"})
    with pytest.raises(ValueError, match=r"got answers: \['a', 1\] as a setting"):
        check_settings("a:b", with_settings, {"answers": ["a", 1]})
    with pytest.raises(ValueError, match="got a setting 'x' of a:b, expected none: it has no settings; remove it"):
        check_settings("a:b", finished_sentence, {"x": 1})
    for given in ("prompts", "lengths"):
        with pytest.raises(ValueError, match=f"got a setting '{given}'"):
            check_settings("a:b", needing_lengths, {given: 1})


def test_a_setting_stands_for_a_column_and_excludes_one():
    check_columns("a:b", multiple_choice, {"topic"}, {"answer": "A"})
    with pytest.raises(ValueError, match=r"got a column 'answer' in the data, .* the config gives a:b this setting"):
        check_columns("a:b", multiple_choice, {"answer"}, {"answer": "A"})


def test_a_function_refuses_before_a_run_what_it_would_refuse_in_it():
    def refuse(*, depth: int = 3) -> None:
        if depth > 5:
            raise ValueError(f"depth: got {depth}, expected at most 5; lower it")

    @only_where(refuse)
    def deep(prompts, responses, *, depth: int = 3, kind: str = "x", **columns):
        return [0.0] * len(responses)

    check_settings("a:b", deep, {"kind": "y"})
    check_settings("a:b", deep, {"depth": 5, "kind": "y"})
    with pytest.raises(ValueError, match="depth: got 6, expected at most 5"):
        check_settings("a:b", deep, {"depth": 6})


def test_columns_that_a_function_looks_at():
    assert columns_read(load_function("text:no_repetition")) == frozenset()
    known = columns_read(load_function("calculators:calculated"), {"relative_tolerance": 0.1})
    assert {"answer", "lower", "upper", "steps"} <= known
    assert "relative_tolerance" not in known
    remote = columns_read(
        load_function("remote:score"), {"url": "http://127.0.0.1:1", "columns": ["topic", "lengths"]}
    )
    assert "topic" in remote
    assert "lengths" not in remote, "what the run knows is no column of the data"

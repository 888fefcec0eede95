"""The option an answer settles on: golden tables, hedging, spam, and options read off the question."""

from __future__ import annotations

import pytest
from patience import no_explosion

from rewards.choice import choice, options_in, settled

OPTIONS = ["Aspirin", "Ibuprofen", "ACE inhibitors", "Vitamin K"]
QUESTION = "Which drug?\nA. Aspirin\nB. Ibuprofen\nC. ACE inhibitors\nD. Vitamin K"


def score(response, gold="B", choices=OPTIONS, prompt="Which drug?"):
    (one,) = choice([prompt], [response], answer=[gold], choices=[choices])
    return one


RIGHT = [
    "B",
    "b",
    "B.",
    "(B)",
    "**B**",
    "B. Ibuprofen",
    "B) Ibuprofen is best here.",
    "(B) because it is safest",
    "The answer is B",
    "The answer is B.",
    "The answer is: (B)",
    "The answer is **B**.",
    "The correct answer is B, because aspirin is not.",
    "the answer is b.",
    "Answer: B",
    "ANSWER: B",
    "Answer = B",
    "Final answer: **B. Ibuprofen**",
    "The best choice is B.",
    "The answer is option B",
    "I choose B.",
    "I would go with B",
    "We should select option B",
    "B is correct.",
    "B is the correct answer because A is weaker.",
    r"\boxed{B}",
    r"So $\boxed{\text{B}}$",
    "Option A is wrong. The answer is B",
    "A is tempting. C is dangerous. So the answer is B.",
    "The answer is B. I repeat: the answer is B.",
    "Ibuprofen",
    "ibuprofen.",
    "**Ibuprofen**",
    "The answer is ibuprofen",
    "The answer is Ibuprofen, since it is safer.",
    "答案是B",
    "答案：B",
    "答案：（B）",
    "答案为 B。",
    "正确答案是B，因为",
    "正确答案：Ｂ",
    "选B",
    "应选B。",
    "故选：B",
    "选择B",
    "B项正确",
    "B正确，因为它更安全。",
    "分析：A不对。答案选B",
    "答案是布洛芬吗？不，答案是B",
    "Let me think.\n\nB\n",
    "<think>A? The answer is A. Or C.</think>The answer is B.",
    "<think>hm</think><answer>B</answer>",
    "𝐁",
    QUESTION + "\nAnswer: B",
    "The answer is b",
    "Answer: b) Ibuprofen",
    "Answer - B",
    "**Answer**: B",
    "The answer is `B`",
    "The answer is 'B'",
    "`B`",
    "Option B",
    "The correct option is B.",
    "B is the answer.",
    "So the answer is $B$.",
    r"The answer is \(B\).",
    r"\boxed{\textbf{(B)}}",
    r"\boxed{\mathrm{B}}",
    '{"answer": "B"}',
    "【答案】B",
    "答案是「B」",
    "正确选项是B",
    "The answer is B, not C.",
    "The answer is B. A or C would harm.",
    "The answer is B, because A/C are weaker.",
    "The answer is B. Ibuprofen, or its salt.",
    "<answer>B</answer> <answer>B</answer>",
]

WRONG = [
    "",
    "A",
    "no idea",
    "The answer is A",
    "A. Aspirin",
    "The answer is A or B",
    "The answer is B or A",
    "The answer is A and B",
    "The answer is B/C",
    "The answer is B, C",
    "The answer is A, B, C, D",
    "The answer is ABCD",
    "答案是A或B",
    "答案：A、B",
    "选A和B",
    "The answer is A. The answer is B.",
    "The answer is B. No, wait: the answer is A.",
    "答案是A。答案是B。",
    "A B C D",
    "A\nB\nC\nD",
    "ABCD",
    "B C",
    "A. B. C. D.",
    QUESTION,
    "Aspirin, Ibuprofen, ACE inhibitors, Vitamin K",
    "Aspirin or Ibuprofen",
    "The answer is not B.",
    "不选B",
    "答案不是B",
    "B is wrong.",
    "The answer is B. Aspirin",
    "The answer is A. Ibuprofen",
    "The answer is В",  # a Cyrillic letter
    "Β",  # a Greek letter
    "The answer is Bob",
    "The answer is BP control",
    "Ibuprofenol",
    "B <think> or not",
    "<think>The answer is B.</think>",
    "<think>The answer is B.",
    "<answer>A</answer><answer>B</answer>",
    "The answer is E",
    "Beta blockers",
    " ".join(f"The answer is {letter}." for letter in "ABCD"),
    r"\boxed{A} \boxed{B}",
    "A is correct. B is correct.",
    "B, C",
    "B, C are both fine",
    "The answer is B, or C",
    "The answer is B (or C)",
    "The answer is B or maybe C",
    "The answer is B, possibly C",
    "The answer is B. Or C.",
    "The answer is (B) or (C)",
    "The answer is **B** or **C**",
    "The answer is B vs C",
    "The answer is B|C",
    "The answer is B. Ibuprofen or A. Aspirin",
    "The answer is B or aspirin",
    "The answer is ibuprofen or aspirin",
    "The answer is B, but C is also correct",
    "答案是B或者C",
    "选B还是C",
    "答案是B，也可能是C",
    "Don't choose B",
    "I would not choose B",
    "不要选择B",
]


@pytest.mark.parametrize("response", RIGHT)
def test_the_right_option_scores_one(response):
    assert score(response) == 1.0


@pytest.mark.parametrize("response", WRONG)
def test_anything_else_scores_zero(response):
    assert score(response) == 0.0


@pytest.mark.parametrize("gold", ["B", "b", "(B)", "B. Ibuprofen", "B、布洛芬", "Ibuprofen", "ibuprofen"])
def test_the_gold_is_a_letter_or_the_words_of_an_option(gold):
    assert [score("The answer is B", gold), score("The answer is C", gold)] == [1.0, 0.0]


@pytest.mark.parametrize("gold", [None, "", "a fever", "maybe", 2, ["B"], float("nan")])
def test_a_row_without_a_letter_is_not_scored(gold):
    assert score("The answer is B", gold) is None


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("The answer is ABD", 1.0),
        ("答案：ABD", 1.0),
        ("答案：A、B、D", 1.0),
        ("The answer is A, B and D.", 1.0),
        ("The answer is D, B, A", 1.0),
        ("The answer is AB", 0.0),
        ("The answer is ABCD", 0.0),
        ("The answer is A or B or D", 0.0),
        ("The answer is A", 0.0),
        ("ABD", 1.0),
        ("A, B, D", 1.0),
        ("A、B和D", 1.0),
        ("A,B and D.", 1.0),
        ("The correct answers are A, B, and D.", 1.0),
        ("ABCD", 0.0),
        ("A, B or D", 0.0),
    ],
)
def test_several_letters_are_a_set(response, expected):
    assert score(response, "ABD") == expected


def test_without_choices_the_prompt_is_read():
    scores = choice([QUESTION] * 3, ["The answer is ibuprofen", "Ibuprofen", "Vitamin K"], answer=["B"] * 3)
    assert scores == [1.0, 1.0, 0.0]
    assert score("ibuprofen", choices={"A": "Aspirin", "B": "Ibuprofen"}) == 1.0
    assert score("ibuprofen", choices="A. Aspirin\nB. Ibuprofen") == 1.0


def test_a_letter_that_no_choice_has_is_no_gold():
    assert [score("The answer is Z", "Z", choices) for choices in (["x", "y"], {"A": "x", "B": "y"})] == [None, None]
    assert score("A and C", "AC", ["x", "y"]) is None
    assert score("The answer is C", "C", {"A": "x", "C": "y"}) == 1.0
    assert score("The answer is Z", "Z", None) == 1.0  # nobody knows the options


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (QUESTION, tuple(OPTIONS)),
        ("q A. one\ntwo\nB. three C. four", ("one\ntwo", "three", "four")),
        (
            "Which germ? A. E. coli B. C. difficile C. S. aureus D. none",
            ("E. coli", "C. difficile", "S. aureus", "none"),
        ),
        ("Hepatitis A. What next? A. x B. y", ("x", "y")),
        ("问题？A、阿司匹林 B、布洛芬", ("阿司匹林", "布洛芬")),
        ("(A) x (B) y", ("x", "y")),
        ("Nothing to choose.", ()),
        ("A. alone", ()),
    ],
)
def test_options_are_found_by_the_next_expected_letter(text, options):
    assert options_in(text) == options


def test_an_article_is_no_letter():
    assert settled("The answer is A fever of unknown origin", ()) == frozenset()
    assert settled("Answer: I do not know") == frozenset()
    assert settled("The answer is A because it is") == {"A"}


@pytest.mark.parametrize(
    "response",
    [
        "The answer is B. " * 60_000,
        "A\n" * 500_000,
        "\n" * 1_000_000,
        "answer " * 150_000,
        "B" * 1_000_000,
        "A. B. C. D. " * 80_000,
        "选" * 1_000_000,
        "<answer>" * 120_000,
        "(" * 1_000_000,
        "answer is" + " " * 1_000_000,
        "\\boxed{" * 140_000,
    ],
    ids=lambda text: repr(text[:14]),
)
def test_a_million_characters_do_not_explode(response):
    with no_explosion():
        assert score(response, "C", prompt=response) == 0.0


def test_each_row_is_scored_by_itself():
    responses = RIGHT + WRONG
    together = choice(
        ["q"] * len(responses), responses, answer=["B"] * len(responses), choices=[OPTIONS] * len(responses)
    )
    assert together == [score(response) for response in responses]
    backwards = choice(
        ["q"] * len(responses), responses[::-1], answer=["B"] * len(responses), choices=[OPTIONS] * len(responses)
    )
    assert backwards == together[::-1]

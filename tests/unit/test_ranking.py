"""Scored answers as pairs and labels: which, in which order, and what is told of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from tiny import byte_tokenizer
from tiny_preferences import read_pairs

from alignment.config import RankRunConfig, RewardDataConfig, SourceConfig
from alignment.data.chat import decode
from alignment.data.conversions import pairs_of_rankings
from alignment.data.judgements import load_judgements
from alignment.data.prompts import make_prompt, prompt_id
from alignment.ranking import (
    ScoredAnswer,
    best_pairs,
    distinct,
    labels_of,
    preference_data,
    prompt_as_asked,
    rows_to_label,
    table,
)

RULES = {"pairs_per_prompt": 2, "min_gap": 0.0, "label_threshold": 0.5, "on_cut": "reject"}


def answer(text: str, score: float, *, prompt: str = "q", finished: bool = True, num_tokens: int = 3) -> ScoredAnswer:
    return ScoredAnswer(
        prompt_id=prompt_id([{"role": "user", "content": prompt}]),
        prompt=prompt,
        sample_index=0,
        response=text,
        finished=finished,
        num_tokens=num_tokens,
        score=score,
    )


def texts(pairs) -> list[str]:
    return [f"{a.response}>{b.response}" for a, b in pairs]


def pairs_of(*answers: ScoredAnswer, most: int = 10, min_gap: float = 0.0, on_cut="reject") -> list[str]:
    return texts(best_pairs(distinct(answers), most=most, min_gap=min_gap, on_cut=on_cut))


FOUR = (answer("a", 0.3), answer("b", 1.0), answer("c", 0.0), answer("d", 0.3))


def test_the_largest_gap_comes_first_and_equal_scores_give_no_pair():
    assert pairs_of(*FOUR) == ["b>c", "b>a", "b>d", "a>c", "d>c"]
    assert pairs_of(*FOUR, most=2) == ["b>c", "b>a"]


@pytest.mark.parametrize(("gap", "expected"), [(0.3, 5), (0.31, 3), (0.7, 3), (0.71, 1), (1.0, 1), (1.01, 0)])
def test_a_gap_is_reached_whatever_floats_make_of_it(gap, expected):
    """1.0 - 0.3 is 0.7 to a person."""
    assert len(pairs_of(*FOUR, min_gap=gap)) == expected
    assert len(pairs_of(answer("a", 0.9), answer("b", 0.6), min_gap=0.3)) == 1


def test_a_text_counts_once_with_the_mean_of_its_scores():
    same = (answer("a", 1.0), answer(" a\n", 0.0), answer("b", 0.25), answer("b", 0.25))
    found = distinct(same)
    assert [(a.response, a.score) for a in found] == [("a", 0.5), ("b", 0.25)]
    assert pairs_of(*same) == ["a>b"]
    # Three times a tenth over three is not a tenth.
    assert distinct([answer("a", 0.1)] * 3)[0].score == 0.1
    composed, apart = "\u00e9", "e\u0301"
    assert len(distinct([answer(composed, 1.0), answer(apart, 0.0)])) == 1


def test_what_a_data_file_cannot_hold_is_left_out():
    assert distinct([answer("  ", 1.0), answer("a\0b", 1.0)]) == []


CUT = (answer("whole", 0.6), answer("cut but good", 1.0, finished=False), answer("cut", 0.1, finished=False))


@pytest.mark.parametrize(
    ("on_cut", "pairs", "labels"),
    [
        ("reject", ["whole>cut"], {"whole": True, "cut": False}),
        ("skip", [], {"whole": True}),
        (
            "keep",
            ["cut but good>cut", "whole>cut", "cut but good>whole"],
            {"whole": True, "cut but good": True, "cut": False},
        ),
    ],
)
def test_a_cut_answer_is_never_the_better_one_unless_asked_for(on_cut, pairs, labels):
    assert pairs_of(*CUT, on_cut=on_cut) == pairs
    assert {a.response: good for a, good in labels_of(CUT, threshold=0.5, on_cut=on_cut)} == labels


def test_one_finished_copy_makes_a_text_finished():
    (one,) = distinct([answer("a", 1.0, finished=False), answer("a", 1.0)])
    assert one.finished


def test_the_threshold_itself_is_desirable():
    assert [good for _, good in labels_of([answer("a", 0.5), answer("b", 0.49)], threshold=0.5, on_cut="reject")] == [
        True,
        False,
    ]


def test_figures():
    """Prompt p: one pair, the chosen longer; q: all score the same; r: one text twice, and an empty one."""
    answers = [
        answer("good", 1.0, prompt="p", num_tokens=6),
        answer("bad", 0.0, prompt="p", num_tokens=2),
        answer("x", 0.0, prompt="q"),
        answer("y", 0.0, prompt="q", finished=False),
        answer("z", 1.0, prompt="r"),
        answer("z", 1.0, prompt="r"),
        answer("", 0.0, prompt="r"),
    ]
    made = preference_data(answers, **RULES)
    figures = made.figures
    assert [(row["chosen"], row["rejected"], row["chosen_score"], row["rejected_score"]) for row in made.pairs] == [
        ("good", "bad", 1.0, 0.0)
    ]
    assert [(row["completion"], row["label"]) for row in made.labels] == [
        ("good", True),
        ("bad", False),
        ("x", False),
        ("y", False),
        ("z", True),
    ]
    counts = {name: value for name, value in figures.items() if isinstance(value, int)}
    assert counts == {
        "prompts": 3,
        "answers": 7,
        "duplicates": 1,
        "empty": 1,
        "cut": 1,
        "prompts_of_one_score": 2,
        "pairs": 1,
        "desirable": 2,
        "undesirable": 3,
    }
    # Means over prompts: 1/2, 0 and 2/3; best 1, 0, 1; worst 0, 0, 0.
    assert figures["score"]["mean"] == pytest.approx(7 / 18)
    assert figures["score"]["ci95"][0] >= 0
    assert figures["score"]["ci95"][1] <= 2 / 3 + 1e-9
    assert (figures["best_score"], figures["worst_score"]) == (pytest.approx(2 / 3), 0.0)
    assert figures["share_of_prompts_with_a_pair"] == pytest.approx(1 / 3)
    assert (figures["gap"], figures["chosen_tokens"], figures["rejected_tokens"]) == (1.0, 6.0, 2.0)
    assert figures["chosen_longer_share"] == 1.0
    assert "chosen longer share            1.000" in table(figures)
    assert "good" not in table(figures), "no text of the data"


def test_no_answers_give_no_rows_and_no_made_up_means():
    made = preference_data([], **RULES)
    assert (made.pairs, made.labels, made.figures["prompts"]) == ([], [], 0)
    assert "score" not in made.figures


def test_both_loaders_read_the_rows_and_hold_out_whole_prompts(tmp_path):
    """The same 12 prompts, of which some are conversations: ids of prompts are those that were answered."""
    tokenizer, prompts, answers = byte_tokenizer(), [], []
    for i in range(12):
        messages = [{"role": "user", "content": f"What about {i}?"}]
        if i % 3 == 0:
            messages = [{"role": "system", "content": "Be brief."}, *messages]
        if i % 3 == 1:
            more = [{"role": "assistant", "content": "Rest."}, {"role": "user", "content": "And then?"}]
            messages = [*messages, *more]
        prompts.append(make_prompt(tokenizer, messages))
        for k, score in enumerate((0.0, 1.0, 0.5, 0.5)):
            one = answer(f"Answer {k} of {i}.", score)
            asked = prompt_as_asked(prompts[-1])
            answers.append(ScoredAnswer(**{**one.row(), "prompt_id": prompts[-1].id, "prompt": asked}))
    assert prompt_as_asked(prompts[2]) == "What about 2?"
    assert isinstance(prompt_as_asked(prompts[0]), list)
    made = preference_data(answers, **{**RULES, "pairs_per_prompt": 3})
    for name, rows in (("pairs", made.pairs), ("labels", made.labels)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    by_ids = {prompt.prompt_ids for prompt in prompts}

    source = SourceConfig(path=str(tmp_path / "pairs.jsonl"))
    pairs = read_pairs(source, tokenizer, held_out=8)
    assert (len(pairs.train), len(pairs.held_out)) == (27, 9), "prompts of three pairs each"
    assert {pair.prompt_ids for pair in (*pairs.train, *pairs.held_out)} == by_ids
    assert {pair.prompt_ids for pair in pairs.train}.isdisjoint(pair.prompt_ids for pair in pairs.held_out)
    assert (pairs.counts["duplicates"], pairs.counts["contradictory"], pairs.counts["truncated"]) == (0, 0, 0)

    source = SourceConfig(path=str(tmp_path / "labels.jsonl"))
    labels = load_judgements(RewardDataConfig(source=source, held_out=8), tokenizer)
    assert (labels.kind, len(labels.train), len(labels.held_out)) == ("labels", 40, 8)
    assert math.fsum(label.target for label in (*labels.train, *labels.held_out)) == 36
    assert {label.prompt_ids for label in labels.train}.isdisjoint(label.prompt_ids for label in labels.held_out)


def doubted(text: str, score: float, disagreement: float | None, *, prompt: str) -> ScoredAnswer:
    return replace(answer(text, score, prompt=prompt), disagreement=disagreement)


UNSURE = [
    *(doubted("a", 1.0, 0.1, prompt="p"), doubted("b", 0.8, 0.2, prompt="p"), doubted("c", 0.0, 0.9, prompt="p")),
    *(doubted("d", 0.5, 0.3, prompt="q"), doubted("e", 0.45, 0.1, prompt="q"), doubted("f", 0.4, None, prompt="q")),
    *(doubted("g", 0.0, 2.0, prompt="alone"), doubted("g", 0.0, 2.0, prompt="alone")),
]


@pytest.mark.parametrize(
    ("unsure_by", "expected"),
    [("gap", [("q", {"d", "e"}), ("p", {"a", "b"})]), ("disagreement", [("p", {"b", "c"}), ("q", {"d", "e"})])],
)
def test_a_person_is_asked_where_the_scores_are_least_sure(unsure_by, expected):
    found = rows_to_label(UNSURE, most=5, unsure_by=unsure_by, on_cut="reject")
    assert [(row["prompt"], set(row["answers"])) for row in found] == expected
    assert rows_to_label(UNSURE, most=1, unsure_by=unsure_by, on_cut="reject") == found[:1]
    assert all(set(row) == {"prompt", "answers", "ranks", "group"} for row in found), "nothing of the scores"


def test_what_a_person_has_ranked_is_read_and_what_waits_is_refused(tmp_path):
    tokenizer, file = byte_tokenizer(), tmp_path / "to_label.jsonl"
    found = rows_to_label(UNSURE, most=2, unsure_by="gap", on_cut="reject")
    config = RewardDataConfig(source=SourceConfig(path=str(file)), held_out=0)
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    with pytest.raises(ValueError, match=r"to_label.jsonl:1: 'ranks': got the same for all answers, expected"):
        load_judgements(config, tokenizer)
    file.write_text("".join(json.dumps({**row, "ranks": [2, 1]}) + "\n" for row in found))
    ranked = load_judgements(config, tokenizer)
    assert ranked.kind == "rankings"
    pairs = pairs_of_rankings(ranked.train)
    assert [decode(tokenizer, pair.chosen_ids) for pair in pairs] == [row["answers"][1] for row in found]


def config_of(**sections) -> RankRunConfig:
    return RankRunConfig.model_validate({"reward": {"functions": [{"name": "text:no_repetition"}]}, **sections})


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"reward": {"model": "m", "normalize": True}}, r"reward\.normalize: got true in a ranking, expected false"),
        (
            {"reward": {"functions": [{"name": "f:g", "part": "p", "normalize": True}]}},
            r"reward\.functions, p: normalize: got true .* set it to false",
        ),
        (
            {"ranking": {"num_samples_per_prompt": 2, "pairs_per_prompt": 2}},
            r"ranking\.pairs_per_prompt: got 2, expected at most the 1 pairs of 2 answers; lower it",
        ),
        (
            {"reward": {"model": "m", "overlong_buffer": 9}, "rollout": {"max_new_tokens": 8}},
            r"reward\.overlong_buffer: got 9, expected at most the 8",
        ),
        ({"ranking": {"unsure_by": "disagreement"}}, r"ranking\.unsure_by: got disagreement with one reward model"),
        ({"ranking": {"num_samples_per_prompt": 1}}, "greater than or equal to 2"),
    ],
)
def test_settings_that_cannot_be_are_refused(sections, said):
    with pytest.raises(ValueError, match=said):
        config_of(**sections)

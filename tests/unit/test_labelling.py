"""A person's lines: what is taken, and what is refused."""

from __future__ import annotations

import pytest

from alignment.config import IterativeRunConfig
from alignment.labelling import asked_rows, check_labelled, early_lines, labelled_pairs, left_out_lines

ASKED = asked_rows([{"prompt": f"{g}?", "answers": [f"{g}1", f"{g}2"], "ranks": [1, 1], "group": g} for g in "ab"], 3)


def line(index=0, **changes):
    return {**ASKED[index], "ranks": [2, 1], **changes}


def test_the_better_answer_is_chosen():
    pairs = labelled_pairs([("f:1", line()), ("f:2", line(1, ranks=[1, 2]))], ASKED)
    assert [(p["prompt"], p["chosen"], p["rejected"]) for p in pairs] == [("a?", "a2", "a1"), ("b?", "b1", "b2")]
    check_labelled(line(), "f:1", num_rounds=4)


def test_a_pair_that_nobody_can_tell_counts_as_told_and_gives_none():
    unsure = line(ranks=None)
    check_labelled(unsure, "f:1", num_rounds=4)
    assert labelled_pairs([("f:1", unsure)], ASKED) == []
    with pytest.raises(ValueError, match="f:2: got a pair that is there twice"):
        labelled_pairs([("f:1", unsure), ("f:2", line())], ASKED)


@pytest.mark.parametrize(
    "changes",
    [
        {"ranks": [1, 1]},
        {"ranks": [2]},
        {"ranks": [True, 2]},
        {"ranks": [2.0, 1]},
        {"round": "3"},
        {"round": 4},
        {"round": -1},
        {"round": True},
        {"answers": []},
    ],
)
def test_a_line_that_says_nothing_is_refused(changes):
    with pytest.raises(ValueError, match=f"f:1: '{next(iter(changes))}': got .*, expected "):
        check_labelled(line(**changes), "f:1", num_rounds=4)
    (name,) = changes
    with pytest.raises(ValueError, match=f"f:1: '{name}': got None"):
        check_labelled({key: value for key, value in line().items() if key != name}, "f:1", num_rounds=4)


def test_lines_that_came_too_late_or_too_early_are_named():
    learnt = [labelled_pairs([("f:1", line())], ASKED)]
    lines = [line(), line(1), line(1, ranks=None), line(ranks=[1, 2]), line(ranks=None)]
    labelled = [(f"f:{n}", {**row, "round": 0}) for n, row in enumerate(lines, start=1)]
    labelled += [("f:6", {**line(), "round": 1}), ("f:7", {**line(), "round": 2})]
    assert left_out_lines(labelled, learnt) == ["f:2", "f:4", "f:5"]
    assert early_lines(labelled, len(learnt)) == ["f:7"]


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([line(), line()], "a pair that is there twice"),
        ([line(answers=["x", "y"])], "not asked in this round"),
        ([line(prompt="another?")], "not asked in this round"),
        ([{key: value for key, value in line().items() if key != "prompt"}], "not asked in this round"),
        ([line(group=["a"])], "not asked in this round"),
    ],
)
def test_a_line_that_nobody_was_asked_is_refused(rows, what):
    with pytest.raises(ValueError, match=f"f:{len(rows)}: got .*{what}"):
        labelled_pairs([(f"f:{n}", row) for n, row in enumerate(rows, start=1)], ASKED)


REWARD = {"functions": [{"name": "text:finished_sentence"}]}
PERSON = {"label_by": "person", "labels": "l.jsonl"}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"run": {"num_steps": 40}}, "run.num_steps: got 40, expected a multiple of rounds.steps_per_round=16"),
        ({"rounds": {"label_by": "person"}}, "rounds.labels: got None"),
        ({"rounds": {"labels": "l.jsonl"}}, "rounds.labels: got 'l.jsonl'"),
        (
            {"rounds": {**PERSON, "labels": "l.txt"}},
            "rounds.labels: got 'l.txt', expected a name",
        ),
        ({"rounds": PERSON}, "ranking.num_to_label: got 0"),
        ({"ranking": {"num_to_label": 3}}, "ranking.num_to_label: got 3"),
        ({"training": {"adapter": {"type": "prompt"}}}, "training.adapter.type: got prompt"),
        (
            {"training": {"adapter": {"type": "adalora", "r": 16}}},
            "reference.follow: got round with adapter",
        ),
        ({"dpo": {"terms": [{"kind": "simpo"}]}}, "reference.follow: got round with dpo.terms"),
        ({"training": {"max_tokens_per_micro_batch": 100}}, "training.max_tokens_per_micro_batch: got 100"),
        ({"rounds": {"replay_share": 1.0}}, "replay_share"),
    ],
)
def test_a_config_that_cannot_be_run_is_refused(sections, said):
    with pytest.raises(ValueError) as error:
        IterativeRunConfig.model_validate({"reward": REWARD, **sections})
    assert said in str(error.value)


def test_rounds_are_counted_from_the_steps():
    config = IterativeRunConfig.model_validate({"reward": REWARD, "run": {"num_steps": 80}})
    assert config.num_rounds == 5

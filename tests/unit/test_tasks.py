"""Judgements of several tasks: held out apart, mixed by weight, pairs beside labels, classes in balance."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from tiny import byte_tokenizer

from alignment.config import DpoRunConfig, KtoRunConfig
from alignment.config.judged_data import LabelsDataConfig, PairsDataConfig
from alignment.data.chat import encode_prompt
from alignment.data.tasks import load_label_tasks, load_pair_tasks
from alignment.label_losses import balanced_weights
from recipes.preference_checks import balance


@pytest.fixture
def files(tmp_path):
    """Pairs `a` and `b`, the latter with half of a's prompts, and labels, three of four desirable."""
    pairs = {
        "a": [{"prompt": f"q{i}?", "chosen": f"good {i}", "rejected": "bad"} for i in range(12)],
        "b": [{"prompt": f"q{i}?", "chosen": f"fine {i}", "rejected": "no"} for i in range(6, 18)],
    }
    labels = [{"prompt": f"l{i}?", "response": f"answer {i}", "label": i % 4 > 0} for i in range(16)]
    for name, rows in {**pairs, "labels": labels}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def pair_tasks(files, *sources, **settings):
    given = [{"path": str(files / f"{s.pop('file')}.jsonl"), **s} for s in sources]
    config = PairsDataConfig.model_validate({"sources": given, "held_out": 3, **settings})
    return load_pair_tasks(config, byte_tokenizer(), seed=1)


def label_config(files, *sources, **kto):
    given = [{"path": str(files / f"{s.pop('file')}.jsonl"), **s} for s in sources]
    return KtoRunConfig.model_validate({"data": {"sources": given, "held_out": 3}, "kto": kto})


def label_tasks(config):
    return load_label_tasks(config.data, byte_tokenizer(), seed=1)


def test_weights_mix_tasks_and_each_begins_again(files):
    tasks = pair_tasks(files, {"file": "a", "weight": 1}, {"file": "b", "weight": 3, "name": "other"})
    drawn = [pair.source for step in range(20) for pair in tasks.batch(step, 4)]
    assert Counter(drawn) == {"a.jsonl": 20, "other": 60}
    assert all(tasks.batch(step, 4) == tasks.batch(step, 4) for step in range(3))
    assert len(tasks.held_out) == 6


def test_without_weights_every_row_comes_once_an_epoch(files):
    tasks = pair_tasks(files, {"file": "a"}, {"file": "b"})
    count = len(tasks.train)
    drawn = [pair.id for step in range(count) for pair in tasks.batch(step, 1)]
    assert sorted(drawn) == sorted(pair.id for pair in tasks.train)


def test_a_prompt_held_out_of_one_task_is_trained_on_in_none(files):
    tasks = pair_tasks(files, {"file": "a"}, {"file": "b"}, held_out=5)
    out = {pair.prompt_ids for pair in tasks.held_out}
    assert not out & {pair.prompt_ids for pair in tasks.train}
    left_out = sum(split.counts.get("held_out_too", 0) for split in tasks.splits.values())
    assert len(tasks.train) == 24 - 10 - left_out
    assert left_out > 0


def test_rows_of_another_source_are_held_out_and_prompts_asked_elsewhere_too(files):
    config = PairsDataConfig.model_validate(
        {"sources": [{"path": str(files / "a.jsonl"), "held_out": {"path": str(files / "b.jsonl")}}]}
    )
    tokenizer = byte_tokenizer()
    tasks = load_pair_tasks(config, tokenizer, seed=1)
    assert (len(tasks.train), len(tasks.held_out)) == (6, 12)
    assert {pair.source for pair in tasks.held_out} == {"a.jsonl"}
    asked = {tasks.train[0].prompt_ids}
    assert len(load_pair_tasks(config, tokenizer, seed=1, kept_out=asked).train) == 5
    with pytest.raises(ValueError, match="behind prompts that are all held out"):
        load_pair_tasks(config, tokenizer, seed=1, kept_out={pair.prompt_ids for pair in tasks.train})


def test_a_question_that_is_cut_is_the_same_question(files):
    """A long answer leaves less of a question than a short one: what is learnt from differs, what was asked is one."""
    for name, numbers, answer in (("long", range(8), "c" * 60), ("short", range(4), "c" * 20)):
        rows = [{"prompt": "why " * 20 + f"{i}?", "chosen": answer, "rejected": "no"} for i in numbers]
        (files / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"file": "long", "held_out": {"path": str(files / "short.jsonl")}}
    tasks = pair_tasks(files, {**source}, cut_prompts=True, max_tokens=100)
    tokenizer = byte_tokenizer()
    asked = [
        sorted(tokenizer.decode(p.prompt_ids).split("?")[0][-1] for p in rows)
        for rows in (tasks.train, tasks.held_out)
    ]
    assert asked == [list("4567"), list("0123")]
    assert tasks.splits["long.jsonl"].counts["prompt_cut"] == 8
    assert tasks.splits["long.jsonl"].counts["held_out_too"] == 4
    # A prompt to be answered for the table is known as a whole.
    config = PairsDataConfig.model_validate(
        {"sources": [{"path": str(files / "long.jsonl")}], "held_out": 0, "cut_prompts": True, "max_tokens": 100}
    )
    whole = tuple(encode_prompt(tokenizer, [{"role": "user", "content": "why " * 20 + "5?"}]))
    assert len(load_pair_tasks(config, tokenizer, seed=1, kept_out={whole}).train) == 7


def test_groups_of_another_source_are_held_out_of_training(files):
    rows = [{"prompt": f"q{i}?", "chosen": "yes", "rejected": "no", "group": f"g{i % 4}"} for i in range(12)]
    elsewhere = [{"prompt": f"r{i}?", "chosen": "yes", "rejected": "no", "group": f"g{i}"} for i in range(2)]
    elsewhere.append({**rows[2], "group": "g0"})
    for name, own in (("rows", rows), ("elsewhere", elsewhere)):
        (files / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    tasks = pair_tasks(files, {"file": "rows", "held_out": {"path": str(files / "elsewhere.jsonl")}})
    assert (len(tasks.train), len(tasks.held_out)) == (5, 3)
    # Six of two groups, and one that is held out itself.
    assert tasks.splits["rows.jsonl"].counts["held_out_too"] == 7


def test_pairs_become_labels_beside_labels(files):
    tasks = label_tasks(label_config(files, {"file": "labels", "weight": 1}, {"file": "a", "weight": 1}))
    first, second = (tasks.splits[name] for name in ("labels.jsonl", "a.jsonl"))
    assert (len(first.train), len(second.train)) == (13, 18)
    assert sum(record.target for record in second.train) == 9
    expected = (sum(r.target for r in first.train) / 13 + 0.5) / 2
    assert tasks.expected_share(lambda record: record.target == 1) == pytest.approx(expected)


def write(files, name, rows):
    (files / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


RATINGS = [
    {"prompt": f"q{i}?", "response": answer, "ratings": rating}
    for i in range(6)
    for answer, rating in (("good", 0.9), ("fair", [0.5, 0.7]), ("bad", 0.2))
]


def sides(pairs):
    tokenizer = byte_tokenizer()
    texts = [
        [tokenizer.decode(ids, skip_special_tokens=True) for ids in (p.chosen_ids, p.rejected_ids)] for p in pairs
    ]
    return Counter(tuple(text) for text in texts)


@pytest.mark.parametrize(
    ("told_apart", "expected"),
    [
        ({"min_gap": 0.35}, [("good", "bad"), ("fair", "bad")]),
        ({"min_gap": 0.3}, [("good", "bad"), ("fair", "bad"), ("good", "fair")]),
        ({"threshold": 0.9, "kind": "ratings"}, [("good", "fair"), ("good", "bad")]),
    ],
)
def test_ratings_become_pairs_as_the_task_tells_them_apart(files, told_apart, expected):
    write(files, "ratings", RATINGS)
    tasks = pair_tasks(files, {"file": "ratings", "name": "own", **told_apart}, held_out=6)
    assert sides(tasks.train) == dict.fromkeys(expected, 4)
    assert sides(tasks.held_out) == dict.fromkeys(expected, 2)
    assert {pair.source for pair in tasks.train} == {"own"}
    assert not {pair.prompt_ids for pair in tasks.train} & {pair.prompt_ids for pair in tasks.held_out}


def test_rankings_become_pairs_beside_pairs(files):
    rows = [{"prompt": f"r{i}?", "answers": ["best", "good", "bad"], "ranks": [1, 2, 2]} for i in range(5)]
    write(files, "rankings", rows)
    tasks = pair_tasks(files, {"file": "rankings"}, {"file": "a"}, held_out=1)
    assert sides(tasks.splits["rankings.jsonl"].train) == {("best", "good"): 4, ("best", "bad"): 4}
    assert len(tasks.splits["a.jsonl"].train) == 11


def test_ratings_become_labels_by_their_threshold(files):
    write(files, "ratings", RATINGS)
    tasks = label_tasks(label_config(files, {"file": "ratings", "threshold": 0.6}))
    assert (len(tasks.train), len(tasks.held_out)) == (15, 3)
    assert [sum(record.target for record in rows) for rows in (tasks.train, tasks.held_out)] == [10, 2]


@pytest.mark.parametrize(
    ("source", "settings", "reason"),
    [
        ({}, {}, r"sources: ratings\.jsonl: got nothing with ratings, expected one of min_gap, threshold"),
        ({"min_gap": 0.2}, {"cut_prompts": True}, "data.cut_prompts: got true with the ratings of"),
        ({"min_gap": 0.8}, {}, "'ratings.jsonl' that give nothing to train on, expected answers to one prompt"),
        ({"min_gap": 0.2, "threshold": 0.5}, {}, "with auto, expected one of min_gap, threshold; set"),
        ({"kind": "ratings"}, {}, "sources: got nothing with ratings, expected one of min_gap, threshold"),
        ({"kind": "rankings", "min_gap": 0.2}, {}, "with rankings, expected none: they are of ratings"),
        ({"kind": "rankings"}, {}, r"ratings\.jsonl:1: 'answers': got no such column"),
    ],
)
def test_ratings_that_cannot_be_told_apart_are_refused(files, source, settings, reason):
    write(files, "ratings", RATINGS)
    with pytest.raises(ValueError, match=reason):
        pair_tasks(files, {"file": "ratings", **source}, **settings)


def test_a_threshold_is_of_ratings_alone(files):
    write(files, "ratings", RATINGS)
    with pytest.raises(ValueError, match=r"ratings\.jsonl: got nothing with ratings, expected one of threshold"):
        label_tasks(label_config(files, {"file": "ratings"}))
    with pytest.raises(ValueError, match=r"labels\.jsonl: got .* with labels, expected none: they are of ratings"):
        label_tasks(label_config(files, {"file": "labels", "threshold": 0.5}))
    with pytest.raises(ValueError, match=r"a\.jsonl: got .* with pairs, expected none: they are of ratings"):
        pair_tasks(files, {"file": "a", "min_gap": 0.5})


def test_two_tasks_of_one_name_are_refused(files):
    with pytest.raises(ValueError, match="expected different names; set name of each"):
        pair_tasks(files, {"file": "a"}, {"file": "a"})


def test_rows_of_labels_are_no_pairs(files):
    with pytest.raises(ValueError, match=r"labels\.jsonl:1"):
        pair_tasks(files, {"file": "labels"})


def test_classes_out_of_balance_are_warned_of_or_weighted(files):
    """13 labels, of which some 9 or 10 are desirable: more than 4/3 to 1."""
    config = label_config(files, {"file": "labels"})
    tasks = label_tasks(config)
    good = sum(record.target for record in tasks.train)
    same, warning = balance(config, tasks)
    assert same == config
    assert "expected 1 to 1.33; set desirable_weight to" in warning
    weighted, nothing = balance(label_config(files, {"file": "labels"}, balance="auto"), tasks)
    assert nothing is None
    ratio = weighted.kto.desirable_weight * good / (weighted.kto.undesirable_weight * (13 - good))
    assert ratio == pytest.approx(4 / 3)
    assert weighted.kto.desirable_weight == 1


@pytest.mark.parametrize(
    ("counts", "weights", "expected"),
    [
        ((10, 30), (1, 1), (3, 1)),
        ((30, 10), (1, 1), (1, 9 / 4)),
        ((11, 10), (1, 1), (1, 1)),
        ((10, 10), (1, 2), (2, 2)),
    ],
)
def test_the_class_that_counts_too_little_is_raised_to_the_nearer_end(counts, weights, expected):
    found = balanced_weights(*counts, desirable_weight=weights[0], undesirable_weight=weights[1])
    assert found == pytest.approx(expected)


def test_a_missing_class_cannot_be_balanced():
    with pytest.raises(ValueError, match="got auto with 5 desirable answers and 0 undesirable ones"):
        balanced_weights(5, 0)


def test_the_defaults_name_assets_that_exist():
    from alignment.data.sources import DERIVED

    for config in (DpoRunConfig(), KtoRunConfig()):
        assert {source.asset for source in config.data.sources} <= set(DERIVED)
    assert LabelsDataConfig().sources[0].kind == "auto"

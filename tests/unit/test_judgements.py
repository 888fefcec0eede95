"""Rows of every kind of judgement: what they become, what is counted, what is refused by line."""

from __future__ import annotations

import json

import pytest
from tiny import byte_tokenizer

from alignment.config import RewardDataConfig, RewardModelRunConfig
from alignment.data.chat import encode_prompt
from alignment.data.judged_assets import (
    harm_rows,
    nq_pair_rows,
    nq_ranking_rows,
    off_topic_rows,
    refusal_rows,
    review_rows,
)
from alignment.data.judgements import load_judgements

USER = [{"role": "user", "content": "Why?"}]
PAIR = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}
RANKING = {"prompt": "Why?", "answers": ["Because.", "Perhaps.", "No."]}
RATING = {"prompt": "Why?", "response": "Because.", "ratings": [0.5, 1.0, 0.75]}
LABEL = {"prompt": "Why?", "response": "Because.", "label": True}
STEPS = {"prompt": "Why?", "steps": ["One é.", "Two 好.", "Three."], "step_labels": [1, 0.5, 0]}
ROWS = {"pairs": PAIR, "rankings": RANKING, "ratings": RATING, "labels": LABEL, "steps": STEPS}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def load(tmp_path, rows, tokenizer, **options):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RewardDataConfig.model_validate({"source": {"path": str(file)}, "held_out": 0, **options})
    return load_judgements(config, tokenizer)


@pytest.mark.parametrize("kind", ROWS)
def test_the_columns_tell_the_kind(tmp_path, tokenizer, kind):
    for asked in ("auto", kind):
        loaded = load(tmp_path, [ROWS[kind]], tokenizer, kind=asked)
        (record,) = loaded.train
        assert loaded.kind == kind
        assert list(record.prompt_ids) == encode_prompt(tokenizer, USER)
        assert record.source == "rows.jsonl"
        for sequence, reads in zip(record.sequences, record.reads, strict=True):
            assert reads[-1] == len(sequence) - 1
            assert tokenizer.decode(sequence[-1]) == "<|im_end|>"


def test_a_ranking_is_put_in_order(tmp_path, tokenizer):
    (plain,) = load(tmp_path, [RANKING], tokenizer).train
    assert [tokenizer.decode(ids) for ids in plain.answer_ids] == [f"{a}<|im_end|>" for a in RANKING["answers"]]
    assert plain.ranks == (1, 2, 3)
    mixed = load(tmp_path, [{**RANKING, "ranks": [3, 1, 1]}], tokenizer)
    (record,) = mixed.train
    assert [tokenizer.decode(ids[:-1]) for ids in record.answer_ids] == ["Perhaps.", "No.", "Because."]
    assert record.ranks == (1, 1, 3)
    assert mixed.split.counts["ties"] == 1


def test_ratings_are_averaged_and_their_agreement_kept(tmp_path, tokenizer):
    rows = [RATING, {**RATING, "response": "b", "ratings": "0.25"}, {**RATING, "response": "c", "ratings": [0, 1]}]
    loaded = load(tmp_path, rows, tokenizer)
    assert [record.target for record in loaded.train] == [0.75, 0.25, 0.5]
    # The standard deviation of 0.5, 0.75, 1 is sqrt(1 / 24).
    assert [record.agreement for record in loaded.train] == pytest.approx([1 - 24**-0.5, 1.0, 0.5])
    assert loaded.split.counts["split_raters"] == 2


@pytest.mark.parametrize(
    ("label", "target"), [(True, 1), (0, 0), ("1", 1), (" No", 0), ("TRUE", 1), (1.0, 1), ("false", 0)]
)
def test_labels_have_the_usual_spellings(tmp_path, tokenizer, label, target):
    assert load(tmp_path, [{**LABEL, "label": label}], tokenizer).train[0].target == target


def test_labels_that_contradict_are_counted(tmp_path, tokenizer):
    loaded = load(tmp_path, [LABEL, LABEL, {**LABEL, "label": False}], tokenizer)
    assert loaded.split.counts == {"rows": 3, "duplicates": 1, "truncated": 0, "contradictory": 1, "positive": 1}


def test_steps_end_in_their_own_last_token(tmp_path, tokenizer):
    (record,) = load(tmp_path, [STEPS], tokenizer).train
    upto = [tokenizer.decode(record.answer_ids[: end + 1]) for end in record.step_ends]
    assert upto == ["One é.", "One é.\nTwo 好.", "One é.\nTwo 好.\nThree.<|im_end|>"]
    assert record.targets == (1.0, 0.5, 0.0)


def test_steps_beyond_the_cut_are_left_out(tmp_path, tokenizer):
    prompt = len(encode_prompt(tokenizer, USER))
    room = len("One é.\nTwo 好.".encode()) + 2
    loaded = load(tmp_path, [STEPS], tokenizer, max_tokens=prompt + room)
    (record,) = loaded.train
    assert tokenizer.decode(record.answer_ids[: record.step_ends[-1] + 1]) == "One é.\nTwo 好."
    assert record.targets == (1.0, 0.5)
    assert loaded.split.counts["truncated"] == 1


def test_another_separator_gives_other_tokens_and_the_same_steps(tmp_path, tokenizer):
    (record,) = load(tmp_path, [STEPS], tokenizer, step_separator=" | ").train
    assert tokenizer.decode(record.answer_ids[: record.step_ends[1] + 1]) == "One é. | Two 好."


def test_margins_are_read_only_when_asked_for(tmp_path, tokenizer):
    row = {**PAIR, "gap": "1.5"}
    assert load(tmp_path, [row], tokenizer).train[0].margin == 0
    assert load(tmp_path, [row], tokenizer, margin_key="gap").train[0].margin == 1.5


def test_sources_are_told_apart_by_name_or_column(tmp_path, tokenizer):
    (tmp_path / "more.jsonl").write_text(json.dumps({**LABEL, "response": "b", "topic": "x"}) + "\n")
    also = [{"path": str(tmp_path / "more.jsonl")}]
    loaded = load(tmp_path, [{**LABEL, "kind": "k"}], tokenizer, also=also)
    assert [record.source for record in loaded.train] == ["k", "more.jsonl"]
    loaded = load(tmp_path, [{**LABEL, "kind": "k"}], tokenizer, also=also, report_by="topic")
    assert [record.source for record in loaded.train] == ["rows.jsonl", "x"]


def test_an_answer_that_is_cut_ends_as_whole_ones_do_where_that_is_asked_for(tmp_path, tokenizer):
    rows = [{**LABEL, "response": "Yes."}, {**LABEL, "response": "Rest and drink a lot of water every day. " * 20}]
    short, long = (record.answer_ids for record in load(tmp_path, rows, tokenizer, max_tokens=64).train)
    ended = load(tmp_path, rows, tokenizer, max_tokens=64, end_cut_answers=True)
    assert [record.answer_ids for record in ended.train] == [short, (*long[:-1], short[-1])]
    assert long[-1] != short[-1]
    assert ended.split.counts["truncated"] == 1


def test_rows_beside_the_source_are_trained_on_and_give_no_prompt_away(tmp_path, tokenizer):
    def labelled(prompts, response):
        return [{**LABEL, "prompt": f"Question {i}?", "response": response} for i in prompts]

    more = tmp_path / "more.jsonl"
    more.write_text("".join(json.dumps(row) + "\n" for row in labelled(range(40), "other")))
    alone = load(tmp_path, labelled(range(20), "own"), tokenizer, held_out=8)
    beside = load(tmp_path, labelled(range(20), "own"), tokenizer, held_out=8, also=[{"path": str(more)}])
    assert beside.held_out == alone.held_out
    assert len(beside.held_out) == 8
    assert beside.train[:12] == alone.train
    assert len(beside.train) == 12 + 40 - 8
    assert beside.split.counts["held_out_too"] == 8
    out = {record.prompt_ids for record in beside.held_out}
    assert not out & {record.prompt_ids for record in beside.train}


@pytest.mark.parametrize("kind", ROWS)
def test_whole_prompts_are_held_out(tmp_path, tokenizer, kind):
    def row(i):
        made = {**ROWS[kind], "prompt": f"p{i % 10}"}
        name = next(name for name in ("response", "chosen", "steps", "answers") if name in made)
        return {**made, name: [f"{i}", *made[name][1:]] if isinstance(made[name], list) else f"{i}"}

    loaded = load(tmp_path, [row(i) for i in range(40)], tokenizer, held_out=8)
    assert (len(loaded.train), len(loaded.held_out)) == (32, 8)
    assert not {r.prompt_ids for r in loaded.train} & {r.prompt_ids for r in loaded.held_out}
    grouped = load(tmp_path, [{**row(i), "group": f"g{i % 4}"} for i in range(40)], tokenizer, held_out=8)
    assert len(grouped.held_out) == 10


BAD = [
    ({**RANKING, "answers": ["a"]}, {}, "'answers': got 1 answers, expected a list of 2 or more"),
    ({**RANKING, "answers": "ab"}, {}, "'answers': got str"),
    (RANKING, {"max_answers": 2}, "'answers': got 3 answers"),
    ({**RANKING, "answers": ["a", "a"]}, {}, "got one answer twice"),
    ({**RANKING, "answers": ["a", 5]}, {}, "'answers': got int, expected text"),
    ({**RANKING, "answers": ["a", " "]}, {}, "got an empty 'answers'"),
    ({**RANKING, "ranks": [1, 1, 1]}, {}, "'ranks': got the same for all answers"),
    ({**RANKING, "ranks": [1, 2]}, {}, "expected 3 whole numbers"),
    ({**RANKING, "ranks": [1, 2, 2.5]}, {}, "expected 3 whole numbers"),
    ({**RANKING, "answers": ["b" * 99, "b" * 98]}, {"max_tokens": 60}, "the same within data.max_tokens=60"),
    ({**RATING, "ratings": []}, {}, "'ratings': got an empty list"),
    ({**RATING, "ratings": [0.5, 1.5]}, {}, "'ratings': got 1.5, expected a number from 0 to 1"),
    ({**RATING, "ratings": ["high"]}, {}, "'ratings': got 'high'"),
    ({**RATING, "ratings": ["nan"]}, {}, "'ratings': got 'nan'"),
    ({**RATING, "response": " "}, {}, "got an empty 'response'"),
    ({"prompt": "a", "ratings": 1}, {}, "'response': got no such column"),
    ({**LABEL, "label": "maybe"}, {}, "'label': got 'maybe', expected true or false"),
    ({**LABEL, "label": 2}, {}, "'label': got 2"),
    ({**LABEL, "prompt": [{"role": "assistant", "content": "a"}]}, {}, "ends with role 'assistant'"),
    ({**LABEL, "prompt": "a" * 99}, {"max_tokens": 60}, "expected fewer than data.max_tokens=60"),
    ({**STEPS, "step_labels": [1]}, {}, "got steps 3 and step_labels 1"),
    ({**STEPS, "steps": []}, {}, "got steps 0 and step_labels 3"),
    ({**STEPS, "step_labels": [1, 0, 2]}, {}, "'step_labels': got 2"),
    ({**STEPS, "steps": ["b" * 99, "a", "c"]}, {"max_tokens": 80}, "got a first step that does not fit"),
    ({**PAIR, "m": -1}, {"margin_key": "m"}, "'m': got -1, expected a number from 0 to inf"),
    (PAIR, {"margin_key": "m"}, "'m': got no such column"),
]


@pytest.mark.parametrize(("row", "options", "reason"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_rows_are_refused_by_line(tmp_path, tokenizer, row, options, reason):
    kind = next(kind for kind, good in ROWS.items() if set(good) & set(row) - {"prompt", "response"})
    good = {**ROWS[kind], **({"m": 1} if options.get("margin_key") else {}), "prompt": "W"}
    if "max_tokens" in options and kind != "steps":
        good.update({name: good[name][:2] for name in ("answers",) if name in good})
    first = [] if options.get("max_answers") or (options.get("margin_key") and "m" not in row) else [good]
    with pytest.raises(ValueError, match=rf"rows\.jsonl:{len(first) + 1}: ") as caught:
        load(tmp_path, [*first, row], tokenizer, kind=kind, **options)
    assert reason in str(caught.value)
    assert str(caught.value).count("rows.jsonl:") == 1


def test_a_row_of_another_kind_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: got a row of labels, expected rankings"):
        load(tmp_path, [RANKING, LABEL], tokenizer)
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: got columns \['text'\], which fit no kind of judgement"):
        load(tmp_path, [{"text": "a"}], tokenizer)
    with pytest.raises(ValueError, match="which fit ratings and labels"):
        load(tmp_path, [{**LABEL, **RATING}], tokenizer)


def test_rows_that_are_too_long_may_be_left_out(tmp_path, tokenizer):
    loaded = load(tmp_path, [LABEL, {**LABEL, "prompt": "a" * 99}], tokenizer, max_tokens=80, on_long="skip")
    assert len(loaded.train) == 1
    assert loaded.split.counts["too_long"] == 1


@pytest.mark.parametrize(
    ("kind", "answers"), [("auto", 2), ("pairs", 2), ("rankings", 5), ("labels", 1), ("steps", 1)]
)
def test_a_forward_holds_a_whole_row(kind, answers):
    data = {"kind": kind, "max_tokens": 100, "max_answers": 5}
    RewardModelRunConfig.model_validate({"data": data, "training": {"max_tokens_per_micro_batch": 100 * answers}})
    small = {"max_tokens_per_micro_batch": 100 * answers - 1}
    with pytest.raises(ValueError, match=rf"got {100 * answers - 1}, expected at least the {100 * answers} of"):
        RewardModelRunConfig.model_validate({"data": data, "training": small})


@pytest.mark.parametrize(
    ("training", "reason"),
    [
        ({"patience": 2}, r"training\.patience: got 2 with training\.validate_every=0"),
        ({"validate_every": 2}, r"training\.validate_every: got 2 with data\.held_out=0"),
    ],
)
def test_validation_needs_rows_and_patience_validation(training, reason):
    with pytest.raises(ValueError, match=reason):
        RewardModelRunConfig.model_validate({"data": {"held_out": 0}, "training": training})


def test_refusals_are_read_behind_the_comments():
    rows = list(refusal_rows())
    assert len(rows) == 169
    assert {row.values["label"] for row in rows} == {"0", "1"}
    assert sum(row.values["label"] == "1" for row in rows) == 109
    assert {row.values["kind"] for row in rows} == {"refusal", "refusal_extra"}
    assert all(row.values["response"].strip() and not row.values["prompt"].startswith("#") for row in rows)


def test_answers_on_and_off_the_topic_are_the_same_texts():
    rows = [row.values for row in off_topic_rows()]
    own = {row["prompt"]: row["response"] for row in rows if row["label"] == 0}
    other = {row["prompt"]: row["response"] for row in rows if row["label"] == 1}
    assert own.keys() == other.keys()
    assert len(own) == 451
    assert sorted(own.values()) == sorted(other.values())
    assert all(own[prompt] != other[prompt] for prompt in own)


def test_an_answer_with_several_raters_is_one_row():
    rows = list(harm_rows())
    assert len(rows) == 984
    assert all(0 <= rating <= 1 for row in rows for rating in row.values["ratings"])
    assert sum(len(row.values["ratings"]) >= 3 for row in rows) == 387
    assert len({(r.values["prompt"].strip(), r.values["response"].strip()) for r in rows}) == len(rows)


def test_reviews_are_told_once_and_only_where_people_agree():
    rows = list(review_rows())
    texts = [row.values["response"] for row in rows]
    assert len(set(texts)) == len(texts) == 17_363
    labels = [row.values["label"] for row in rows]
    assert (labels.count(1), labels.count(0)) == (8332, 9031)
    assert 0.4 < sum(labels[:1000]) / 1000 < 0.6, "the first rows are of both kinds"
    names = {row.values["label"]: row.where.rsplit("/", 1)[-1].split(":")[0] for row in rows}
    assert names == {1: "pos.txt", 0: "neg.txt"}


def test_answers_to_questions_as_people_judged_them():
    pairs, rankings = list(nq_pair_rows()), list(nq_ranking_rows())
    assert len(pairs) == 1545
    assert all(row.values["chosen"] != row.values["rejected"] for row in pairs)
    assert len(rankings) == 763
    assert all(2 <= len(row.values["answers"]) == len(set(row.values["answers"])) <= 6 for row in rankings)
    assert all(row.values["ranks"] == sorted(row.values["ranks"]) for row in rankings)

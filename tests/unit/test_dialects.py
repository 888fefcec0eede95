"""Others' columns of preference data give our records; conversations part where they differ; prompts are cut before
answers."""

from __future__ import annotations

import json

import pytest
from tiny import byte_tokenizer
from tiny_preferences import read_pairs

from alignment.config import RewardDataConfig, SourceConfig
from alignment.data.chat import encode_prompt
from alignment.data.judgements import load_judgements


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def written(tmp_path, rows):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return SourceConfig(path=str(file))


def pairs(tmp_path, tokenizer, *rows, **options):
    return read_pairs(written(tmp_path, rows), tokenizer, **options)


def labels(tmp_path, tokenizer, *rows, **options):
    config = RewardDataConfig(source=written(tmp_path, rows), **{"held_out": 0, **options})
    return load_judgements(config, tokenizer)


def turn(role, content):
    return {"role": role, "content": content}


ASKED = [turn("user", "Why?")]
EARLIER = [turn("user", "So?"), turn("assistant", "So."), turn("user", "Why?")]
SHARED = "\n\nHuman: So?\n\nAssistant: So.\n\nHuman: Why?\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"instruction": "Why?", "chosen": "Yes.", "rejected": "No."}, ASKED),
        ({"instruction": "Why?", "input": "", "output": ["Yes.", "No."]}, ASKED),
        ({"instruction": "Say", "input": "why", "chosen": "Yes.", "rejected": "No."}, [turn("user", "Say\n\nwhy")]),
        ({"instruction": "Why?", "history": [["So?", "So."]], "chosen": "Yes.", "rejected": "No."}, EARLIER),
        (
            {"instruction": "Why?", "system": "Be.", "chosen": "Yes.", "rejected": "No."},
            [turn("system", "Be."), *ASKED],
        ),
        ({"chosen": f"{SHARED} Yes.", "rejected": f"{SHARED} No."}, EARLIER),
        (
            {
                "chosen": [*EARLIER, turn("assistant", "Yes.")],
                "rejected": [*EARLIER, turn("assistant", "No.")],
            },
            EARLIER,
        ),
    ],
)
def test_pairs_of_every_dialect(tmp_path, tokenizer, row, asked):
    (pair,) = pairs(tmp_path, tokenizer, row).train
    assert list(pair.prompt_ids) == encode_prompt(tokenizer, asked)
    assert tokenizer.decode(pair.chosen_ids) == "Yes.<|im_end|>"
    assert tokenizer.decode(pair.rejected_ids) == "No.<|im_end|>"


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"prompt": "Why?", "completion": "Yes.", "label": True}, ASKED),
        ({"prompt": ASKED, "completion": [turn("assistant", "Yes.")], "label": True}, ASKED),
        ({"instruction": "Why?", "output": "Yes.", "kto_tag": True}, ASKED),
        ({"instruction": "Say", "input": "why", "output": "Yes.", "kto_tag": 1}, [turn("user", "Say\n\nwhy")]),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Why?"},
                    {"from": "gpt", "value": "Yes."},
                ],
                "kto_tag": True,
            },
            ASKED,
        ),
        ({"messages": [*EARLIER, turn("assistant", "Yes.")], "label": "yes"}, EARLIER),
        (
            {"messages": [*ASKED, turn("assistant", "Yes.")], "system": "Be.", "label": "yes"},
            [turn("system", "Be."), *ASKED],
        ),
        ({"instruction": "Why?", "output": "Yes.", "completion": None, "kto_tag": True}, ASKED),
        ({"instruction": "Why?", "output": "No.", "completion": "Yes.", "kto_tag": True}, ASKED),
        ({"prompt": "Why?", "response": "Yes.", "system": "Be.", "label": True}, [turn("system", "Be."), *ASKED]),
        ({"prompt": ASKED, "completion": "Yes.", "system": "Be.", "label": 1}, [turn("system", "Be."), *ASKED]),
        ({"prompt": "Why?", "response": "Yes.", "thumbs": "up"}, ASKED),
        ({"prompt": "Why?", "response": "Yes.", "thumbs": "\N{THUMBS UP SIGN}"}, ASKED),
        ({"prompt": "Why?", "answer": "Yes.", "label": 1}, ASKED),
    ],
)
def test_labels_of_every_dialect(tmp_path, tokenizer, row, asked):
    loaded = labels(tmp_path, tokenizer, row)
    (label,) = loaded.train
    assert loaded.kind == "labels"
    assert label.target == 1
    assert list(label.prompt_ids) == encode_prompt(tokenizer, asked)
    assert tokenizer.decode(label.answer_ids) == "Yes.<|im_end|>"


@pytest.mark.parametrize("thumb", ["down", "Thumbs_Down", "\N{THUMBS DOWN SIGN}", -1, "-1", 0, False, "no"])
def test_thumbs_down(tmp_path, tokenizer, thumb):
    (label,) = labels(tmp_path, tokenizer, {"prompt": "Why?", "response": "No.", "thumbs": thumb}).train
    assert label.target == 0


def test_conversations_part_at_their_first_different_answer(tmp_path, tokenizer):
    chosen = f"{SHARED} Yes.\n\nHuman: Good.\n\nAssistant: Thanks."
    loaded = pairs(tmp_path, tokenizer, {"chosen": chosen, "rejected": f"{SHARED} No."})
    (pair,) = loaded.train
    assert list(pair.prompt_ids) == encode_prompt(tokenizer, EARLIER)
    assert tokenizer.decode(pair.chosen_ids) == "Yes.<|im_end|>"
    assert loaded.counts["later_turns_dropped"] == 1
    assert "later turns dropped 1" in loaded.summary()


def test_transcripts_keep_what_looks_like_one_and_join_a_speakers_turns(tmp_path, tokenizer):
    shared = "\n\nHuman: one\n\nHuman: two\nAssistant: no turn\n\nAssistant:"
    (pair,) = pairs(tmp_path, tokenizer, {"chosen": f"{shared} a\n\nb", "rejected": f"{shared} c"}).train
    asked = [turn("user", "one\n\ntwo\nAssistant: no turn")]
    assert list(pair.prompt_ids) == encode_prompt(tokenizer, asked)
    assert tokenizer.decode(pair.chosen_ids) == "a\n\nb<|im_end|>"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
            "different prompts",
        ),
        ({"chosen": f"{SHARED} Yes.", "rejected": f"{SHARED}"}, "got an empty 'rejected'"),
        ({"chosen": f"{SHARED} Yes.", "rejected": f"{SHARED} Yes."}, "got chosen equal to rejected"),
        (
            {"chosen": f"{SHARED} Yes.\n\nHuman: a\n\nAssistant: b", "rejected": f"{SHARED} Yes."},
            "got chosen equal to rejected",
        ),
        ({"chosen": f"{SHARED} Yes.", "rejected": f"{SHARED} No.\n\nHuman: a"}, "expected the assistant's"),
        ({"instruction": " ", "chosen": "a", "rejected": "b"}, "'instruction': got an empty cell"),
    ],
)
def test_pairs_that_cannot_be_parted_are_refused_by_line(tmp_path, tokenizer, row, reason):
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: ") as caught:
        pairs(tmp_path, tokenizer, row)
    assert reason in str(caught.value)
    assert str(caught.value).count("rows.jsonl:1") == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": ASKED, "label": True}, "'messages': got no answer at the end"),
        (
            {"prompt": "a", "completion": [turn("user", "b")], "label": True},
            "'completion': got a turn of role 'user', expected the assistant's; correct the row",
        ),
        ({"prompt": "a", "completion": EARLIER, "label": True}, "'completion': got 3 messages"),
        ({"prompt": "a", "completion": "b", "thumbs": "sideways"}, "'label': got 'sideways'"),
    ],
)
def test_labels_without_an_answer_are_refused_by_line(tmp_path, tokenizer, row, reason):
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: ") as caught:
        labels(tmp_path, tokenizer, row)
    assert reason in str(caught.value)
    assert str(caught.value).count("rows.jsonl:1") == 1


LONG = {"prompt": "p" * 100, "chosen": "c" * 30, "rejected": "r" * 5}


def test_a_prompt_is_cut_from_its_beginning_before_an_answer_loses_anything(tmp_path, tokenizer):
    whole = encode_prompt(tokenizer, [turn("user", LONG["prompt"])])
    cut = pairs(tmp_path, tokenizer, LONG, cut_prompts=True, max_tokens=80)
    (pair,) = cut.train
    assert list(pair.prompt_ids) == whole[-(80 - 31) :]
    assert tokenizer.decode(pair.chosen_ids) == LONG["chosen"] + "<|im_end|>"
    assert tokenizer.decode(pair.rejected_ids) == LONG["rejected"] + "<|im_end|>"
    assert (cut.counts["prompt_cut"], cut.counts["truncated"]) == (1, 0)
    assert "prompt cut 1" in cut.summary()
    room = len(whole) + 31
    uncut = pairs(tmp_path, tokenizer, LONG, cut_prompts=True, max_tokens=room)
    assert list(uncut.train[0].prompt_ids) == whole
    assert "prompt_cut" not in uncut.counts


def test_an_answer_that_alone_is_too_long_leaves_the_end_of_the_prompt(tmp_path, tokenizer):
    cut = pairs(tmp_path, tokenizer, {**LONG, "chosen": "c" * 200}, cut_prompts=True, max_tokens=80)
    (pair,) = cut.train
    assert (len(pair.prompt_ids), len(pair.chosen_ids)) == (16, 64)
    assert tokenizer.decode(pair.rejected_ids) == LONG["rejected"] + "<|im_end|>"
    assert (cut.counts["prompt_cut"], cut.counts["truncated"]) == (1, 1)


def test_labels_are_cut_alike(tmp_path, tokenizer):
    row = {"prompt": "p" * 100, "completion": "c" * 30, "label": False}
    loaded = labels(tmp_path, tokenizer, row, cut_prompts=True, max_tokens=60)
    (label,) = loaded.train
    assert (len(label.prompt_ids), len(label.answer_ids)) == (29, 31)
    assert loaded.split.counts["prompt_cut"] == 1
    with pytest.raises(ValueError, match=r"expected fewer than data\.max_tokens=60"):
        labels(tmp_path, tokenizer, row, max_tokens=60)

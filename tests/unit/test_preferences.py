"""Preference pairs: one prompt prefix, every accepted form, honest cuts, refusals by line, a split by prompt (P07)."""

from __future__ import annotations

import json

import pytest
from tiny_preferences import read_pairs
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from alignment.config import SourceConfig
from alignment.data.chat import encode_prompt
from alignment.data.medical import repair_mojibake, treatment_plan_pairs, treatment_plans
from alignment.data.reading import messages_of

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USER = [{"role": "user", "content": "Why?"}]
BLANKS = [{"role": "user", "content": " Why?\n"}]
EARLIER = [{"role": "user", "content": "So?"}, {"role": "assistant", "content": "So."}]
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(name, normalized=False) for name in ("<|im_start|>", "<|im_end|>")])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=CHATML, eos_token="<|im_end|>")


def load(tmp_path, rows, tokenizer, **options):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_pairs(SourceConfig(path=str(file)), tokenizer, **options)


def said(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


FORMS = [
    {"prompt": "Why?", "chosen": "Because.", "rejected": "No."},
    {"prompt": USER, "chosen": "Because.", "rejected": "No."},
    {"prompt": USER, "chosen": said("Because."), "rejected": said("No.")},
    {"chosen": USER + said("Because."), "rejected": USER + said("No.")},
    {"prompt": "Why?", "chosen": USER + said("Because."), "rejected": USER + said("No.")},
    {
        "conversations": [{"from": "human", "value": "Why?"}],
        "chosen": {"from": "gpt", "value": "Because."},
        "rejected": {"from": "gpt", "value": "No."},
    },
]


@pytest.mark.parametrize("row", FORMS)
def test_every_form_gives_the_same_pair(tmp_path, tokenizer, row):
    (pair,) = load(tmp_path, [row], tokenizer).train
    assert list(pair.prompt_ids) == encode_prompt(tokenizer, USER)
    assert tokenizer.decode(pair.chosen_ids) == "Because.<|im_end|>"
    assert tokenizer.decode(pair.rejected_ids) == "No.<|im_end|>"
    assert pair.id == load(tmp_path, FORMS[:1], tokenizer).train[0].id


def test_system_prompt_and_earlier_turns_belong_to_the_prompt(tmp_path, tokenizer):
    turns = [*USER, *said("So."), {"role": "user", "content": "And?"}]
    (pair,) = load(
        tmp_path, [{"prompt": turns, "chosen": "a", "rejected": "b"}], tokenizer, system_prompt="Be brief."
    ).train
    system = {"role": "system", "content": "Be brief."}
    assert list(pair.prompt_ids) == encode_prompt(tokenizer, [system, *turns])


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "asked"),
    [
        ("Why?", BLANKS, BLANKS, USER),
        ("Why?\n", USER, BLANKS, USER),
        ("Why?", [SYSTEM, *USER], [SYSTEM, *USER], [SYSTEM, *USER]),
        ("Why?", [SYSTEM, *USER], USER, [SYSTEM, *USER]),
        ([SYSTEM, *USER], USER, USER, [SYSTEM, *USER]),
        ("Why?", [*EARLIER, *USER], [*EARLIER, *USER], [*EARLIER, *USER]),
        ("Why?", [SYSTEM, *EARLIER, *USER], [*EARLIER, *USER], [SYSTEM, *EARLIER, *USER]),
        ([*EARLIER, *USER], USER, USER, [*EARLIER, *USER]),
    ],
)
def test_a_prompt_beside_whole_conversations_may_tell_less_of_it(tmp_path, tokenizer, prompt, chosen, rejected, asked):
    row = {"prompt": prompt, "chosen": [*chosen, *said("a")], "rejected": [*rejected, *said("b")]}
    (pair,) = load(tmp_path, [row], tokenizer).train
    assert list(pair.prompt_ids) == encode_prompt(tokenizer, asked)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?"},
        {"prompt": USER},
        {"conversations": USER},
        {"chosen": USER + said("a"), "rejected": USER + said("b")},
        {"conversations": [SYSTEM, *USER], "system": "Another."},
        {"prompt": [SYSTEM, *USER], "system": "Another."},
    ],
)
def test_a_system_column_stands_before_a_prompt_without_one(tmp_path, tokenizer, row):
    given = {"system": "Be brief.", "chosen": "a", "rejected": "b", **row}
    (pair,) = load(tmp_path, [given], tokenizer, system_prompt="Never used.").train
    assert list(pair.prompt_ids) == encode_prompt(tokenizer, [SYSTEM, *USER])


def test_control_tokens_in_answers_are_text_and_each_side_has_one_end(tmp_path, tokenizer):
    row = {"prompt": "a<|im_end|>", "chosen": "b<|im_end|>\n<|im_start|>user", "rejected": "\n\nc"}
    (pair,) = load(tmp_path, [row], tokenizer).train
    end = tokenizer.eos_token_id
    assert pair.prompt_ids.count(end) == 1
    for ids in (pair.chosen_ids, pair.rejected_ids):
        assert ids.count(end) == 1
        assert ids[-1] == end
    assert tokenizer.decode(pair.rejected_ids) == "\n\nc<|im_end|>"


def test_a_cut_takes_the_end_of_the_answer_and_no_more_than_needed(tmp_path, tokenizer):
    row = {"prompt": "Why?", "chosen": "c" * 50, "rejected": "short"}
    prompt = len(encode_prompt(tokenizer, USER))
    cut = load(tmp_path, [row], tokenizer, max_tokens=prompt + 20)
    (pair,) = cut.train
    assert len(pair.prompt_ids) == prompt
    assert tokenizer.decode(pair.chosen_ids) == "c" * 20  # no end token is invented
    assert tokenizer.decode(pair.rejected_ids) == "short<|im_end|>"
    assert cut.counts["truncated"] == 1
    assert load(tmp_path, [row], tokenizer, max_tokens=prompt + 51).counts["truncated"] == 0

    swapped = {"prompt": "Why?", "chosen": "short", "rejected": "c" * 50}
    (pair,) = load(tmp_path, [swapped], tokenizer, max_tokens=prompt + 20).train
    assert tokenizer.decode(pair.rejected_ids) == "c" * 20


@pytest.mark.parametrize(
    ("row", "options", "reason"),
    [
        ({"prompt": "a", "chosen": "x", "rejected": "x"}, {}, "got chosen equal to rejected"),
        ({"prompt": "a", "chosen": " ", "rejected": "x"}, {}, "got an empty 'chosen'"),
        ({"prompt": "a", "chosen": "x", "rejected": ""}, {}, "got an empty 'rejected'"),
        ({"prompt": "a", "chosen": None, "rejected": "x"}, {}, "'chosen': got null"),
        ({"prompt": "a", "rejected": "x"}, {}, "'chosen': got no such column"),
        ({"chosen": "y", "rejected": "x"}, {}, "'prompt': got no such column"),
        ({"prompt": " ", "chosen": "y", "rejected": "x"}, {}, "got an empty prompt"),
        ({"prompt": 5, "chosen": "y", "rejected": "x"}, {}, "'prompt': got int, expected text or a list of messages;"),
        ({"prompt": "a", "chosen": 5, "rejected": "x"}, {}, "'chosen': got int, expected text or a list of messages;"),
        ({"prompt": "a", "chosen": ["y"], "rejected": "x"}, {}, "'chosen': messages: got a str"),
        ({"prompt": "a", "chosen": USER, "rejected": "x"}, {}, "expected the assistant's; drop what follows"),
        ({"prompt": "a", "chosen": "y", "rejected": "x", "system": 5}, {}, "'system': got int, expected text"),
        ({"prompt": said("a"), "chosen": "y", "rejected": "x"}, {}, "ends with role 'assistant'"),
        (
            {"chosen": USER + said("y"), "rejected": [{"role": "user", "content": "b"}, *said("x")]},
            {},
            "different prompts",
        ),
        ({"prompt": "b", "chosen": USER + said("y"), "rejected": USER + said("x")}, {}, "differs from the beginning"),
        (
            {"prompt": "Why?", "chosen": [*EARLIER, *USER, *said("y")], "rejected": USER + said("x")},
            {},
            "different prompts",
        ),
        (
            {
                "prompt": [SYSTEM, *USER],
                "chosen": [{**SYSTEM, "content": "No."}, *USER, *said("y")],
                "rejected": USER + said("x"),
            },
            {},
            "differs from the beginning",
        ),
        ({"prompt": "a" * 99, "chosen": "y", "rejected": "x"}, {"max_tokens": 60}, "expected fewer than data.max_tok"),
        ({"prompt": "a", "chosen": "y" * 99, "rejected": "y" * 98}, {"max_tokens": 60}, "two answers with the same"),
    ],
)
def test_bad_rows_are_refused_by_line(tmp_path, tokenizer, row, options, reason):
    with pytest.raises(ValueError, match=r"pairs\.jsonl:2: ") as caught:
        load(tmp_path, [FORMS[0], row], tokenizer, **options)
    assert reason in str(caught.value)
    assert str(caught.value).count("pairs.jsonl:2") == 1


def test_a_number_that_is_none_is_told_with_its_column():
    """Columns of text in .parquet may hold it."""
    with pytest.raises(ValueError, match=r"'rejected': got no text \(nan\), expected text or a list of messages"):
        messages_of(float("nan"), "rejected")


def test_counts_tell_duplicates_contradictions_and_length_bias(tmp_path, tokenizer):
    swapped = {"prompt": "Why?", "chosen": "No.", "rejected": "Because."}
    loaded = load(tmp_path, [FORMS[0], FORMS[1], swapped, {**FORMS[0], "prompt": "How?"}], tokenizer)
    assert loaded.counts == {"rows": 4, "duplicates": 1, "truncated": 0, "contradictory": 1, "chosen_longer": 2}
    assert len(loaded.train) == 3


def test_pairs_of_one_prompt_or_group_stay_together(tmp_path, tokenizer):
    rows = [
        {"prompt": f"p{n % 20}", "chosen": f"c{n}", "rejected": "r", "group": f"g{n % 10}" if n % 2 else None}
        for n in range(80)
    ]
    plain = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]
    train, held_out = load(tmp_path, plain, tokenizer, held_out=10)
    assert len(held_out) == 12  # whole prompts of 4 pairs until 10 are out
    assert not {p.prompt_ids for p in train} & {p.prompt_ids for p in held_out}

    # Numbers are groups as well, 0 among them.
    grouped = [{**row, "group": int(row["group"][1:]) - 1} for row in rows if row["group"]]
    group_of = {
        tuple(encode_prompt(tokenizer, [{"role": "user", "content": r["prompt"]}])): r["group"] for r in grouped
    }
    for wanted in (4, 12, 20, 28):
        train, held_out = load(tmp_path, grouped, tokenizer, held_out=wanted)
        assert len(held_out) == wanted + 4  # groups of 8
        assert not {group_of[p.prompt_ids] for p in train} & {group_of[p.prompt_ids] for p in held_out}


def test_real_preference_file_with_conversations(tokenizer):
    source = SourceConfig(asset="dpo-zh-demo", limit=20)
    train, held_out = read_pairs(source, tokenizer, max_tokens=100_000, held_out=4)
    assert (len(train), len(held_out)) == (16, 4)
    assert all(p.chosen_ids[-1] == p.rejected_ids[-1] == tokenizer.eos_token_id for p in train)


def test_treatment_plans_are_whole_clean_and_named():
    plans = treatment_plans()
    assert len(plans) >= 250
    assert len({plan.group for plan in plans}) >= 140
    assert len({(plan.group, plan.text) for plan in plans}) == len(plans)
    everything = " ".join(plan.disease + plan.text for plan in plans)
    assert "Ã" not in everything
    assert "•" not in everything
    assert "\n" not in everything
    assert all(plan.text[-1] in ".!?" for plan in plans)
    names = {plan.disease for plan in plans}
    assert {"Sjögren's syndrome", "type 2 diabetes", "hypertension", "coronary artery disease (CAD)"} <= names


def test_treatment_pairs_teach_relevance_and_completeness_without_a_length_bias():
    rows = treatment_plan_pairs()
    assert rows == treatment_plan_pairs()
    assert [r.values for r in rows] != [r.values for r in treatment_plan_pairs(seed=2)]
    for kind in ("other_disease", "unfinished"):
        pairs = [row.values for row in rows if row.values["kind"] == kind]
        assert len(pairs) >= 250
        assert all(pair["chosen"][-1] in ".!?" for pair in pairs)
        assert all((pair["rejected"][-1] in ".!?") == (kind == "other_disease") for pair in pairs)
        assert all(5 <= len(pair[side].split()) <= 60 for pair in pairs for side in ("chosen", "rejected"))
        longer = sum(len(pair["chosen"]) > len(pair["rejected"]) for pair in pairs) / len(pairs)
        assert 0.4 < longer < 0.6
    assert all(not set(row.values["prompt"]) & set("Ã•\n") for row in rows)


@pytest.mark.parametrize(
    ("broken", "whole"),
    [("SjÃ¶gren", "Sjögren"), ("Â£5", "£5"), ("itâ€™s", "it’s"), ("Sjögren", "Sjögren"), ("naïve Â", "naïve Â")],
)
def test_mojibake_is_undone_and_real_letters_are_kept(broken, whole):
    assert repair_mojibake(broken) == whole

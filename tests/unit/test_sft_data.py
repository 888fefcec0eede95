"""Supervised examples: ids and masks by hand (P01-P03, P07), cuts, duplicates, a split by question, pure batches."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny import byte_tokenizer, write_tiny_model
from tokenizers import processors

from alignment.config import SftDataConfig, SftSourceConfig
from alignment.data.chat import encode_conversation, encode_prompt, encode_text
from alignment.data.sft import load_sft_data
from alignment.data.split import digest, held_out_groups, hold_out
from alignment.types import pad_rows

DIALOGUE = [
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because."},
    {"role": "user", "content": "So?"},
    {"role": "assistant", "content": "Yes."},
]
QA = [{"prompt": f"q{n}", "completion": f"answer {n}"} for n in range(20)]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def load(folder, tokenizer, *tables, weights=(), seed=17, **options):
    sources = []
    for number, rows in enumerate(tables):
        file = write(folder / f"{number}.jsonl", rows)
        sources.append(SftSourceConfig(path=str(file), weight=weights[number] if weights else None))
    config = SftDataConfig(sources=tuple(sources), **{"held_out": 0, **options})
    return load_sft_data(config, tokenizer, seed=seed)


def marked(tokenizer, text):
    """Ids and mask of a text whose learnt parts stand in double brackets."""
    ids, mask = [], []
    for number, part in enumerate(re.split(r"\[\[|\]\]", text)):
        more = tokenizer(part, add_special_tokens=False)["input_ids"]
        ids += more
        mask += [number % 2 == 1] * len(more)
    return tuple(ids), tuple(mask)


USER, ANSWER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
BY_HAND = [
    ({"messages": DIALOGUE[:2]}, "all_turns", f"{USER}Why?{ANSWER}[[Because.<|im_end|>]]"),
    (
        {"messages": DIALOGUE},
        "all_turns",
        f"{USER}Why?{ANSWER}[[Because.<|im_end|>]]\n{USER}So?{ANSWER}[[Yes.<|im_end|>]]",
    ),
    (
        {"messages": DIALOGUE},
        "last_turn",
        f"{USER}Why?{ANSWER}Because.<|im_end|>\n{USER}So?{ANSWER}[[Yes.<|im_end|>]]",
    ),
    (
        {"conversations": [{"role": "assistant", "content": "Hi"}, *DIALOGUE[:3]]},
        "last_turn",
        f"{USER}Why?{ANSWER}[[Because.<|im_end|>]]",
    ),
    (
        {"instruction": "Sum up.", "input": "高", "output": "血"},
        "last_turn",
        f"{USER}Sum up.\n\n高{ANSWER}[[血<|im_end|>]]",
    ),
    ({"text": "plain"}, "last_turn", "p[[lain<|im_end|>]]"),
]


@pytest.mark.parametrize(("row", "train_on", "text"), BY_HAND)
def test_ids_and_masks_by_hand(tmp_path, tokenizer, row, train_on, text):
    data = load(tmp_path, tokenizer, [row], train_on=train_on)
    (example,) = data.batch(0, 1)
    assert (example.input_ids, example.response_mask) == marked(tokenizer, text)


def test_the_system_prompt_stands_before_conversations_that_have_none(tmp_path, tokenizer):
    own = [{"role": "system", "content": "Own."}, *DIALOGUE[:2]]
    rows = [{"messages": own}, {"messages": DIALOGUE[:2]}, {"messages": DIALOGUE[:2], "system": "Column."}]
    data = load(tmp_path, tokenizer, rows, system_prompt="Given.")
    begun = {tokenizer.decode(e.input_ids).split("\n")[1].removesuffix("<|im_end|>") for e in data.batch(0, 3)}
    assert begun == {"Own.", "Given.", "Column."}


def gives_bos(template):
    """A tokenizer that puts a BOS in front by itself, as Llama's and Gemma's do."""
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = template
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer


GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}<|im_start|>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
LLAMA = "{{ bos_token }}" + byte_tokenizer().chat_template


@pytest.mark.parametrize("template", [GEMMA, LLAMA], ids=["gemma", "llama"])
def test_exactly_one_bos_in_conversations_and_in_plain_text(tmp_path, template):
    tokenizer = gives_bos(template)
    rows = [{"messages": DIALOGUE}], [{"text": "plain <|endoftext|>"}]
    for example in load(tmp_path, tokenizer, *rows).batch(0, 2):
        assert example.input_ids[0] == tokenizer.bos_token_id
        assert example.input_ids.count(tokenizer.bos_token_id) == 1
        assert not example.response_mask[0]
    (chat,) = load(tmp_path, tokenizer, rows[0]).batch(0, 1)
    rendered = tokenizer.apply_chat_template(DIALOGUE, tokenize=True, return_dict=False)
    assert list(chat.input_ids) == rendered[: len(chat.input_ids)]
    assert encode_text(tokenizer, "ab")[1] == [False, True, True, True]
    assert encode_text(byte_tokenizer(), "ab")[0] == encode_text(tokenizer, "ab")[0][1:]


def test_what_a_template_refuses_names_the_row(tmp_path):
    rows = [{"messages": DIALOGUE}, {"messages": DIALOGUE[:2], "system": "Be brief."}]
    with pytest.raises(ValueError, match=r"0\.jsonl:2: chat template: refuses the messages \(System role not supp"):
        load(tmp_path, gives_bos(GEMMA), rows)


def test_the_ids_before_an_answer_are_those_generation_starts_from(tmp_path, tokenizer):
    for row, turns in (({"messages": DIALOGUE[:2]}, 1), ({"messages": DIALOGUE}, 3)):
        (example,) = load(tmp_path, tokenizer, [row], train_on="last_turn").batch(0, 1)
        prompt = encode_prompt(tokenizer, DIALOGUE[:turns])
        assert list(example.input_ids[: len(prompt)]) == prompt
        assert example.response_mask == (False,) * len(prompt) + (True,) * example.num_trained


def test_never_all_is_trained_and_a_template_that_says_so_is_refused(tmp_path, tokenizer):
    for row, train_on, _ in BY_HAND:
        (example,) = load(tmp_path, tokenizer, [row], train_on=train_on).batch(0, 1)
        assert 0 < example.num_trained < len(example.input_ids)
    mute = byte_tokenizer()
    mute.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="answer with nothing in front"):
        encode_conversation(mute, DIALOGUE[:2])


def test_the_end_token_has_a_gradient_and_padding_of_the_same_id_has_none(tmp_path, tokenizer):
    from transformers import AutoModelForCausalLM

    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    model = AutoModelForCausalLM.from_pretrained(write_tiny_model(tmp_path / "model"))
    data = load(tmp_path, tokenizer, [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b" * 30}])
    short, long = sorted(data.batch(0, 2), key=lambda example: len(example.input_ids))
    ids = pad_rows([torch.tensor(short.input_ids), torch.tensor(long.input_ids)], value=tokenizer.pad_token_id)
    mask = pad_rows([torch.tensor(short.response_mask), torch.tensor(long.response_mask)], value=False)
    logits = model(input_ids=ids).logits
    logits.retain_grad()
    logprobs = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    (-logprobs * mask[:, 1:]).sum().backward()
    end = len(short.input_ids) - 1
    assert short.input_ids[end] == tokenizer.eos_token_id
    p = logits.detach()[0, end - 1].softmax(-1)
    expected = p.clone()
    expected[tokenizer.eos_token_id] -= 1
    torch.testing.assert_close(logits.grad[0, end - 1], expected)
    assert expected.abs().max() > 0.5
    assert (logits.grad[0, end:] == 0).all()
    assert ids[0, end + 1 :].eq(tokenizer.eos_token_id).all()


def test_a_cut_takes_the_end_and_invents_no_end_token(tmp_path, tokenizer):
    whole, mask = marked(tokenizer, f"{USER}Why?{ANSWER}[[Because.<|im_end|>]]\n{USER}So?{ANSWER}[[Yes.<|im_end|>]]")
    rows = [{"messages": DIALOGUE}]
    first = mask.index(True)
    for length in range(first + 1, len(whole) + 1):
        data = load(tmp_path, tokenizer, rows, max_tokens=length)
        (example,) = data.batch(0, 1)
        assert (example.input_ids, example.response_mask) == (whole[:length], mask[:length])
        assert ("cut 1" in data.summary()) == (length < len(whole))


def test_long_rows_are_dropped_when_nothing_is_left_skipped_or_refused(tmp_path, tokenizer):
    rows = [*QA[:3], {"prompt": "long" * 50, "completion": "x"}, {"prompt": "q", "completion": "long" * 50}]
    cut = load(tmp_path, tokenizer, rows, max_tokens=60)
    assert cut.num_examples == 4
    assert "too long 1, " in cut.summary()
    assert "cut 1, " in cut.summary()
    skipped = load(tmp_path, tokenizer, rows, max_tokens=60, on_long="skip")
    assert skipped.num_examples == 3
    assert "too long 2, " in skipped.summary()
    with pytest.raises(ValueError, match=r"0\.jsonl:4: got over 60 tokens, expected at most data\.max_tokens; raise"):
        load(tmp_path, tokenizer, rows, max_tokens=60, on_long="error")
    with pytest.raises(ValueError, match=r"got no example to train on out of 5 rows .* too long: 5\), expected some"):
        load(tmp_path, tokenizer, rows, max_tokens=5)


def test_a_last_turn_beyond_the_cut_teaches_nothing(tmp_path, tokenizer):
    rows = [QA[0], {"messages": DIALOGUE}]
    data = load(tmp_path, tokenizer, QA[:1], [{"messages": DIALOGUE}], max_tokens=40, train_on="last_turn")
    assert data.num_examples == 1
    assert "too long 1" in data.summary()
    with pytest.raises(ValueError, match=r"0\.jsonl:2: got a row of format messages, expected prompt\+completion"):
        load(tmp_path, tokenizer, rows)


def test_duplicates_and_unanswered_rows_go_and_are_counted(tmp_path, tokenizer):
    messages = {"messages": [{"role": "user", "content": "q3"}, {"role": "assistant", "content": "answer 3"}]}
    data = load(tmp_path, tokenizer, [*QA, QA[0], QA[1]], [messages, {"messages": DIALOGUE[:1]}])
    assert data.num_examples == 20
    assert len({example.id for example in data.batch(0, 20)}) == 20
    assert "rows 24, " in data.summary()
    assert "duplicates 3, " in data.summary()
    assert "unanswered 1, " in data.summary()
    assert "formats prompt_completion messages" in data.summary()
    assert not any(word in data.summary() for word in ("answer 3", "Why", "q3"))


def test_one_question_never_stands_on_both_sides(tmp_path, tokenizer):
    questions = [{"prompt": f"q{n % 15}", "completion": f"a{n}"} for n in range(60)]
    grouped = [{"instruction": f"g{n}", "output": "x", "group": f"group {n % 7}"} for n in range(35)]
    data = load(tmp_path, tokenizer, questions, grouped, held_out=12)

    def asked(examples):
        return {tokenizer.decode(example.input_ids).split("\n")[1] for example in examples}

    train = data.batch(0, data.num_examples)
    assert len(train) + len(data.held_out) == 95
    assert 12 <= len(data.held_out) < 12 + 5
    assert not asked(train) & asked(data.held_out)
    group = {f"g{n}<|im_end|>": n % 7 for n in range(35)}
    sides = [{group[text] for text in asked(side) if text in group} for side in (train, data.held_out)]
    assert not sides[0] & sides[1]
    assert load(tmp_path, tokenizer, questions, grouped, held_out=12, seed=99).held_out == data.held_out


def test_the_split_is_that_of_other_data():
    torch.manual_seed(0)
    groups = [f"group {int(n)}" for n in torch.randint(0, 40, (200,))]
    numbers = np.array([int(digest(g), 16) for g in groups], dtype="uint64")
    for wanted in (0, 1, 17, 64, 150):
        split = hold_out(list(enumerate(groups)), wanted, group=lambda r: r[1], counts={}, what="rows")
        out = held_out_groups(numbers, wanted)
        assert [index for index, _ in split.held_out] == [int(i) for i in out.nonzero()[0]]


def test_every_epoch_is_a_permutation_and_a_step_needs_no_other(tmp_path, tokenizer):
    data = load(tmp_path, tokenizer, QA)
    steps = [data.batch(step, 7) for step in range(10)]
    ids = [example.id for batch in steps for example in batch]
    everything = set(ids)
    epochs = [ids[start : start + 20] for start in (0, 20, 40)]
    assert all(set(epoch) == everything and len(epoch) == 20 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    for step in (9, 0, 5, 2):
        assert load(tmp_path, tokenizer, QA).batch(step, 7) == steps[step] == data.batch(step, 7)
    assert [e.id for step in range(5) for e in data.batch(step, 4)] == ids[:20]  # the batch size only groups them
    assert load(tmp_path, tokenizer, QA, seed=18).batch(0, 7) != steps[0]


def test_weights_mix_sources_and_each_has_epochs_of_its_own(tmp_path, tokenizer):
    tables = [
        [{"prompt": f"{name}{n}", "completion": "x"} for n in range(size)] for name, size in (("a", 4), ("b", 50))
    ]
    data = load(tmp_path, tokenizer, *tables, weights=(3, 1))
    first = [[tokenizer.decode(e.input_ids).split("\n")[1][:2] for e in data.batch(step, 8)] for step in range(50)]
    assert all(sum(text[0] == "a" for text in batch) == 6 for batch in first)
    small = [text for batch in first for text in batch if text[0] == "a"]
    for start in range(0, 300, 4):
        assert sorted(small[start : start + 4]) == ["a0", "a1", "a2", "a3"]
    assert load(tmp_path, tokenizer, *tables, weights=(3, 1)).batch(33, 8) == data.batch(33, 8)


def test_a_weighted_source_without_examples_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"data\.sources\.1: got no example to train on"):
        load(tmp_path, tokenizer, QA, QA[:5], weights=(1, 1))
    assert load(tmp_path, tokenizer, QA, QA[:5]).num_examples == 20
    with pytest.raises(
        ValueError, match=r"got no example to train on out of 20 rows in all \(held out: data.held_out=20"
    ):
        load(tmp_path, tokenizer, QA, held_out=20)
    with pytest.raises(ValueError, match=r"got no example to train on out of 1 rows .* unanswered: 1"):
        load(tmp_path, tokenizer, [{"messages": DIALOGUE[:1]}])


def test_the_fingerprint_tells_every_row_its_group_and_the_order(tmp_path, tokenizer):
    def of(*tables, **options):
        return load(tmp_path, tokenizer, *tables, **options).fingerprint()

    plain = of(QA)
    assert plain == of(QA, seed=3, held_out=4, max_tokens=99)
    changed = [
        of([*QA[:7], {**QA[7], "completion": "other"}, *QA[8:]]),
        of([*QA[:7], {**QA[7], "group": "other"}, *QA[8:]]),
        of(QA[::-1]),
        of(QA[:-1]),
        of([*QA, QA[0]]),
        of(QA[:10], QA[10:]),
        of(QA, system_prompt="Be brief."),
    ]
    assert len({plain, *changed}) == 8


def test_some_weights_and_no_source_are_refused():
    one, other = SftSourceConfig(path="a", weight=1), SftSourceConfig(path="b")
    with pytest.raises(
        ValidationError, match=r"got weights \[1\.0, None\], expected one for every source or for none"
    ):
        SftDataConfig(sources=(one, other))
    with pytest.raises(ValidationError, match="at least 1 item"):
        SftDataConfig(sources=())
    with pytest.raises(ValidationError, match="greater than 0"):
        SftSourceConfig(path="a", weight=0)


def test_examples_are_plain_records(tmp_path, tokenizer):
    (example,) = load(tmp_path, tokenizer, QA[:1]).batch(0, 1)
    assert all(type(token) is int for token in example.input_ids)
    assert all(type(learnt) is bool for learnt in example.response_mask)
    assert dataclasses.replace(example) == example

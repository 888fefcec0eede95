"""Prompt sets: identity, duplicates, limits, a split that stays put, and steps without state (P40)."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from alignment.config import PromptDataConfig, SourceConfig
from alignment.data.chat import encode_prompt
from alignment.data.prompts import load_prompts, make_prompt, prompts_for_step

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(name, normalized=False) for name in ("<|im_start|>", "<|im_end|>")])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=CHATML, eos_token="<|im_end|>")


def config(tmp_path, rows, **options) -> PromptDataConfig:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PromptDataConfig(source=SourceConfig(path=str(file)), **{"held_out": 0, **options})


def questions(count: int, start: int = 0) -> list[dict]:
    return [{"question": f"What helps against ailment {n}?", "topic": n % 3} for n in range(start, start + count)]


def test_text_becomes_one_user_turn_and_other_columns_travel(tmp_path, tokenizer):
    train, held_out = load_prompts(config(tmp_path, [{"question": " Why? ", "answer": "C", "n": 3}]), tokenizer)
    assert not held_out
    (prompt,) = train
    assert prompt.messages == ({"role": "user", "content": "Why?"},)
    assert prompt.columns == {"answer": "C", "n": 3}
    assert list(prompt.prompt_ids) == encode_prompt(tokenizer, prompt.messages)
    assert prompt == make_prompt(tokenizer, prompt.messages, prompt.columns)


def test_system_prompt_goes_in_front_unless_the_row_has_one(tmp_path, tokenizer):
    own = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
    rows = [{"messages": own[1:]}, {"messages": own}]
    loaded = load_prompts(config(tmp_path, rows, prompt_key="messages", system_prompt="Be brief."), tokenizer)
    assert [p.messages[0]["content"] for p in loaded.train] == ["Be brief.", "Be kind."]
    assert len({p.id for p in loaded.train}) == 2


def test_the_id_depends_on_the_messages_alone(tmp_path, tokenizer):
    first = load_prompts(config(tmp_path, [{"question": "Why?", "n": 1}]), tokenizer).train[0]
    again = load_prompts(config(tmp_path, [{"x": 0, "question": "Why?"}]), tokenizer).train[0]
    other = load_prompts(config(tmp_path, [{"question": "How?"}]), tokenizer).train[0]
    assert first.id == again.id == "e13d9f034ee5b023"
    assert first.id != other.id


def test_duplicates_are_dropped_and_counted(tmp_path, tokenizer):
    rows = questions(5)
    loaded = load_prompts(config(tmp_path, [*rows, rows[3], {"question": rows[0]["question"] + " "}]), tokenizer)
    assert len(loaded.train) == 5
    assert loaded.counts == {"rows": 7, "duplicates": 2, "too_long": 0}
    assert loaded.summary() == "5 train, 0 held out (rows 7, duplicates 2)"


def test_long_prompts_are_refused_by_line_or_skipped_aloud(tmp_path, tokenizer):
    rows = [{"question": "Why?"}, {"question": "x" * 200}]
    length = len(encode_prompt(tokenizer, [{"role": "user", "content": "x" * 200}]))
    with pytest.raises(ValueError, match=rf"jsonl:2: got a prompt of {length} tokens, expected at most 128"):
        load_prompts(config(tmp_path, rows), tokenizer)
    skipped = load_prompts(config(tmp_path, rows, on_long_prompt="skip"), tokenizer)
    assert [p.messages[0]["content"] for p in skipped.train] == ["Why?"]
    assert skipped.counts["too_long"] == 1
    assert len(load_prompts(config(tmp_path, rows, max_prompt_tokens=length), tokenizer).train) == 2


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"other": "x"}, "no such column"),
        ({"question": None}, "got null"),
        ({"question": "  "}, "got an empty 'question'"),
        ({"question": 3}, "messages: got int"),
        ({"question": []}, "messages: got an empty list"),
        ({"question": [{"role": "user"}]}, "content of type NoneType"),
        ({"question": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "drop the answer"),
    ],
)
def test_rows_without_a_prompt_are_refused_by_line(tmp_path, tokenizer, row, reason):
    with pytest.raises(ValueError, match=r"prompts\.jsonl:2: ") as caught:
        load_prompts(config(tmp_path, [{"question": "Why?"}, row]), tokenizer)
    assert reason in str(caught.value)


def test_held_out_has_the_wanted_size_and_nothing_in_common_with_train(tmp_path, tokenizer):
    train, held_out = load_prompts(config(tmp_path, questions(100), held_out=20), tokenizer)
    assert (len(train), len(held_out)) == (80, 20)
    assert not {p.id for p in train} & {p.id for p in held_out}


def test_the_split_ignores_order_and_hardly_moves_when_rows_are_added(tmp_path, tokenizer):
    def held(rows):
        return {p.id for p in load_prompts(config(tmp_path, rows, held_out=20), tokenizer).held_out}

    before = held(questions(100))
    assert held(questions(100)[::-1]) == before
    for extra in (1, 5, 20):
        after = held([*questions(extra, start=1000), *questions(100)])
        assert len(before - after) <= extra  # each new row can push out one at the border, and no more


def test_a_split_that_leaves_nothing_to_train_on_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"data\.held_out: got 5 of 5 prompts, which leaves none"):
        load_prompts(config(tmp_path, questions(5), held_out=5), tokenizer)


@pytest.mark.parametrize(("count", "batch"), [(1000, 128), (10, 10), (7, 3), (10, 7), (5, 4), (64, 16), (3, 1)])
def test_steps_deal_out_every_prompt_once_an_epoch_and_never_twice_a_step(tokenizer, count, batch):
    prompts = [make_prompt(tokenizer, [{"role": "user", "content": str(n)}]) for n in range(count)]
    steps = [prompts_for_step(prompts, step, batch_size=batch, seed=3) for step in range(3 * count // batch + 3)]
    assert all(len({p.id for p in step}) == batch for step in steps)
    dealt = [p.id for step in steps for p in step]
    for epoch in range(3):
        assert Counter(dealt[epoch * count : (epoch + 1) * count]) == Counter(p.id for p in prompts)
    assert count < 5 or dealt[:count] != dealt[count : 2 * count]


def test_a_step_is_a_pure_function_so_resuming_needs_no_state(tokenizer):
    prompts = [make_prompt(tokenizer, [{"role": "user", "content": str(n)}]) for n in range(1000)]
    whole = [prompts_for_step(prompts, step, batch_size=128, seed=1) for step in range(20)]
    for step in (19, 7, 8, 0, 15):  # 8 begins at place 1,024: the 24th of the second epoch
        assert prompts_for_step(prompts, step, batch_size=128, seed=1) == whole[step]
    assert prompts_for_step(prompts, 0, batch_size=128, seed=2) != whole[0]
    assert {p.id for p in prompts_for_step(prompts, 0, batch_size=128, seed=2)} != {p.id for p in whole[0]}


def test_a_batch_larger_than_the_data_is_refused(tokenizer):
    prompts = [make_prompt(tokenizer, [{"role": "user", "content": "Why?"}])]
    with pytest.raises(ValueError, match=r"rollout_batch_size: got 2, expected at most the 1 training prompts"):
        prompts_for_step(prompts, 0, batch_size=2, seed=1)

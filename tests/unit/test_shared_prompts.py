"""Answers that share their prompt's computation have the losses and gradients of answers apart."""

from __future__ import annotations

import pytest
import torch
from tiny import write_tiny_model

from alignment import models
from alignment.learners.answers import answer_logprobs
from alignment.shared_prompts import (
    cheapest_rows,
    common_length,
    saved_tokens,
    shared_logprobs,
    shared_rows,
    shares_prompts,
)

GROUPS = [((1, 2, 3), [(4, 5), (6,)]), ((7,), [(8, 9, 10, 11)])]


def groups_of(count, seed=0, begin=()):
    draw = torch.Generator().manual_seed(seed)

    def ids(low, high):
        length = int(torch.randint(low, high, (1,), generator=draw))
        return tuple(torch.randint(3, 200, (length,), generator=draw).tolist())

    return [(begin + ids(1, 20), [ids(1, 9) for _ in range(2 + i % 3)]) for i in range(count)]


def test_rows_by_hand():
    rows = shared_rows(GROUPS)
    assert rows.input_ids.tolist() == [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 0]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 4, 3], [0, 1, 2, 3, 4, 0]]
    assert rows.before.tolist() == [2, 3, 2, 6, 7, 8, 9]
    assert rows.targets.tolist() == [4, 5, 6, 8, 9, 10, 11]
    assert rows.visible()[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0, 1],
    ]
    assert rows.visible()[1, 0, 5].int().tolist() == [0, 0, 0, 0, 0, 1]  # padding


def test_small_groups_share_a_row_and_see_nothing_of_each_other():
    rows = shared_rows([((1, 2), [(3,), (4, 5, 6)]), ((7,), [(8,)]), ((9,), [(10, 11)])])
    assert rows.input_ids.tolist() == [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 0]]
    assert rows.visible()[1, 0, 4].int().tolist() == [0, 0, 1, 1, 1, 0]
    assert rows.before.tolist() == [1, 1, 3, 4, 6, 8, 9]


def test_what_all_prompts_begin_with_stands_once_in_a_row():
    """The second prompt is the common beginning and nothing else."""
    rows = shared_rows([((1, 2, 3), [(4, 5), (6,)]), ((1, 2), [(7, 8)])], layers=10**6)
    assert rows.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 2, 3]]
    assert rows.before.tolist() == [2, 3, 2, 1, 6]
    assert rows.targets.tolist() == [4, 5, 6, 7, 8]
    assert rows.visible()[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 0, 1, 1],
    ]


def test_rows_are_as_wide_as_attention_allows():
    assert cheapest_rows([300] * 4, 100, layers=10**6) == [[0, 1, 2, 3]]  # the beginning once: fewest tokens
    assert [len(row) for row in cheapest_rows([300] * 4, 100, layers=0)] == [1] * 4  # least attention
    # 1300 (1700 + 1300), 2 x 700 (1700 + 700) or 4 x 400 (1700 + 400)
    assert cheapest_rows([300] * 4, 100, layers=1700) == [[0, 2], [1, 3]]
    assert common_length([(1, 2, 3), (1, 2), (1, 2, 9)]) == 2
    assert common_length([(1, 2, 3)] * 2) == 3
    assert common_length([(4,), (5,)]) == 0


@pytest.mark.parametrize("begin", [(), (5, 6, 7, 8, 9)], ids=["", "begin alike"])
@pytest.mark.parametrize(
    ("kind", "attention"), [("llama", "sdpa"), ("llama", "eager"), ("qwen2", "sdpa"), ("gpt2", "sdpa")]
)
def test_losses_and_gradients_are_those_of_answers_apart(tmp_path, kind, attention, begin):
    folder = write_tiny_model(tmp_path, kind)
    model = models.load_causal_lm(str(folder), attention=attention)
    groups = groups_of(5, begin=begin)
    answers = [(prompt, answer) for prompt, group in groups for answer in group]
    draw = torch.Generator().manual_seed(1)
    weights = torch.randn(len(answers), generator=draw)

    def gradients(sums):
        model.zero_grad()
        loss = (weights * sums).sum() / len(answers)
        loss.backward()
        return loss.item(), [p.grad.clone() for _, p in model.named_parameters()]

    logprobs, response = answer_logprobs(model, answers)
    shared = shared_logprobs(model, groups)
    for row, mask, found in zip(logprobs, response, shared, strict=True):
        torch.testing.assert_close(found, row[mask], atol=1e-5, rtol=1e-5)
    loss, expected = gradients(logprobs.sum(1))
    together, found = gradients(torch.stack([row.sum() for row in shared]))
    assert together == pytest.approx(loss, abs=1e-5, rel=1e-5)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert shares_prompts(model)


def test_an_answer_sees_nothing_of_the_others(tmp_path):
    model = models.load_causal_lm(str(write_tiny_model(tmp_path)))
    first = shared_logprobs(model, [((5, 6), [(7, 8), (9, 10, 11)]), ((3,), [(4,)])])[1]
    other = shared_logprobs(model, [((5, 6), [(70, 80), (9, 10, 11)]), ((30,), [(40,)])])[1]
    assert torch.equal(first, other)


def test_a_limited_view_is_noticed(tmp_path):
    model = models.load_causal_lm(str(write_tiny_model(tmp_path, "mistral", sliding_window=4)))
    assert not shares_prompts(model)


def test_tokens_saved_by_hand():
    assert saved_tokens([((1,) * 6, [(2,) * 2, (3,) * 2])]) == pytest.approx(1 - 10 / 16)
    assert saved_tokens([((1,), [(2,) * 9])]) == 0

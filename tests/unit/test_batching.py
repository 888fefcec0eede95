"""Cutting a batch: every row once, within the limit, about equally full, and no more micro-batches than needed."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from pydantic import ValidationError
from tiny_learners import critic_learner, gradients, policy_learner, rollouts_of

from alignment.batching import micro_batches
from alignment.config import (
    ClusterConfig,
    PolicyConfig,
    PpoRunConfig,
    RewardConfig,
    RewardModelRunConfig,
    RewardModelTrainingConfig,
)
from alignment.experience import make_experience
from alignment.packing import MicroBatchLimit, computed_tokens, pack
from recipes.planning import batch_arithmetic

LAYOUTS = ("padded", "packed", "one_row")


def lengths_of(count, seed=0, high=400):
    draw = random.Random(seed)
    return [draw.randint(1, high) for _ in range(count)]


def cut(lengths, **limit):
    parts = micro_batches(torch.arange(len(lengths)), torch.tensor(lengths), MicroBatchLimit(**limit))
    return [part.tolist() for part in parts]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("tokens", [400, 1000, 2048, 10**6])
@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_every_row_is_in_one_micro_batch_within_the_limit(layout, rows, tokens, count):
    lengths = lengths_of(count, seed=count)
    parts = cut(lengths, rows=rows, tokens=tokens, layout=layout)
    assert sorted(itertools.chain(*parts)) == list(range(count))
    assert all(parts)
    for part in parts:
        assert computed_tokens([lengths[i] for i in part], layout) <= tokens
        assert rows is None or len(part) <= rows


def test_rows_alone_are_cut_by_their_number():
    assert cut([5, 1, 4, 2, 3], rows=2) == [[1, 3], [4, 2], [0]]
    assert cut([5, 1, 4]) == [[1, 2, 0]]
    assert cut([]) == []
    assert cut([], tokens=7) == []


def fewest_padded(lengths, tokens):
    """By trying every cut of the ascending lengths."""
    ascending = sorted(lengths)
    n = len(ascending)
    for cuts in range(n):
        for places in itertools.combinations(range(1, n), cuts):
            ends = zip((0, *places), (*places, n), strict=True)
            if all(computed_tokens(ascending[a:b], "padded") <= tokens for a, b in ends):
                return cuts + 1
    raise AssertionError("a row is longer than the budget")


@pytest.mark.parametrize("seed", range(12))
def test_padded_micro_batches_are_the_fewest_and_the_largest_of_them_is_the_smallest_possible(seed):
    lengths, tokens = lengths_of(9, seed=seed, high=100), 260
    parts = cut(lengths, tokens=tokens)
    assert len(parts) == fewest_padded(lengths, tokens)
    largest = max(computed_tokens([lengths[i] for i in part], "padded") for part in parts)
    if len(parts) > 1:
        assert fewest_padded(lengths, max(largest - 1, max(lengths))) > len(parts) or largest == max(lengths)
    # Neighbours in length: no micro-batch reaches into another's range.
    ranges = [[lengths[i] for i in part] for part in parts]
    assert all(max(a) <= min(b) for a, b in itertools.pairwise(ranges))


@pytest.mark.parametrize("seed", range(6))
def test_unpadded_micro_batches_are_equally_full(seed):
    lengths, tokens = lengths_of(60, seed=seed), 2048
    parts = cut(lengths, tokens=tokens, layout="one_row")
    full = [sum(lengths[i] for i in part) for part in parts]
    assert len(parts) <= -(-sum(lengths) // tokens) + 1
    assert max(full) - min(full) < min(lengths) + 40


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_over_the_budget_is_a_micro_batch_of_its_own(layout):
    parts = cut([10, 900, 20, 30], tokens=100, layout=layout)
    assert sorted(itertools.chain(*parts)) == [0, 1, 2, 3]
    assert [1] in parts
    assert len(parts) == 2


def test_a_pair_counts_both_of_its_sequences():
    pairs = [[30, 50], [50, 20], [40, 40]]
    assert cut(pairs, tokens=199) == [[2], [0], [1]]
    assert [len(part) for part in cut(pairs, tokens=200)] == [2, 1]
    assert [len(part) for part in cut(pairs, tokens=230, layout="one_row")] == [3]
    assert sorted(len(part) for part in cut(pairs, tokens=229, layout="one_row")) == [1, 2]


@pytest.mark.parametrize("seed", range(6))
def test_packed_rows_hold_every_sequence_once_and_are_few(seed):
    lengths = lengths_of(50, seed=seed)
    rows = pack(lengths, max(lengths))
    assert sorted(itertools.chain(*rows)) == list(range(50))
    assert all(sum(lengths[i] for i in row) <= max(lengths) for row in rows)
    # At most one row is less than half full, or two of them would have been one.
    assert sum(2 * sum(lengths[i] for i in row) <= max(lengths) for row in rows) <= 1
    assert computed_tokens(lengths, "packed") == len(rows) * max(lengths)


def test_packing_by_hand():
    assert pack([3, 7, 0, 5, 2, 1], 8) == [[1, 5], [3, 0], [4]]
    assert computed_tokens([3, 7, 0, 5, 2, 1], "packed") == 3 * 7
    assert [computed_tokens([2, 6, 4], layout) for layout in LAYOUTS] == [18, 12, 12]
    assert [computed_tokens([], layout) for layout in LAYOUTS] == [0, 0, 0]


def test_the_config_says_what_bounds():
    assert PolicyConfig().micro_batch_limit() == MicroBatchLimit(rows=4)
    assert RewardConfig(model="x").micro_batch_limit() == MicroBatchLimit(rows=8)
    assert PolicyConfig(max_tokens_per_micro_batch=512).micro_batch_limit("packed") == MicroBatchLimit(
        tokens=512, layout="packed"
    )
    assert RewardModelTrainingConfig(micro_batch_size=2, max_tokens_per_micro_batch=512).micro_batch_limit() == (
        MicroBatchLimit(rows=2, tokens=512)
    )


def test_a_budget_without_room_for_the_longest_sequence_is_refused():
    ppo = {"reward": {"model": "x"}, "data": {"max_prompt_tokens": 100}, "rollout": {"max_new_tokens": 28}}
    for section in ("policy", "critic"):
        PpoRunConfig.model_validate({**ppo, section: {"max_tokens_per_micro_batch": 128}})
        with pytest.raises(
            ValidationError, match=rf"{section}\.max_tokens_per_micro_batch: got 127, .* at least the 128"
        ):
            PpoRunConfig.model_validate({**ppo, section: {"max_tokens_per_micro_batch": 127}})
    RewardModelRunConfig.model_validate({"training": {"max_tokens_per_micro_batch": 512}})
    with pytest.raises(ValidationError, match=r"training\.max_tokens_per_micro_batch: got 511, .* at least the 512"):
        RewardModelRunConfig.model_validate({"training": {"max_tokens_per_micro_batch": 511}})


def test_the_dry_run_says_what_the_budget_comes_to():
    config = PpoRunConfig.model_validate(
        {
            "reward": {"model": "x"},
            "data": {"max_prompt_tokens": 100},
            "rollout": {"max_new_tokens": 28},
            "policy": {"max_tokens_per_micro_batch": 400},
            "critic": {"micro_batch_size": 5},
        }
    )
    alone = batch_arithmetic(config, ClusterConfig(colocate=()))
    assert (
        "policy: 16 = up to 6 accumulated micro-batches x at most 400 tokens (3 where each sequence has the longest "
        "128 tokens, more where they are shorter) x 1 workers"
    ) in alone
    assert "critic: 16 = up to 4 accumulated micro-batches x 5 sequences x 1 workers" in alone
    many = batch_arithmetic(config, ClusterConfig.model_validate({"colocate": [], "policy": {"num_workers": 4}}))
    assert "policy: 16 = about 2 accumulated micro-batches" in many


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [20, 45, 1000])
def test_a_token_budget_gives_the_gradients_of_the_whole_batch(tiny, layout, tokens):
    rollouts = rollouts_of(8)
    found = []
    for limit in (MicroBatchLimit(rows=8), MicroBatchLimit(tokens=tokens, layout=layout)):
        policy, critic = policy_learner(tiny / "policy"), critic_learner(tiny / "policy")
        policy.micro_batch_limit = critic.micro_batch_limit = limit
        old, values = policy.logprobs(rollouts), critic.values(rollouts)
        experience, _ = make_experience(rollouts, list(range(8)), old, [row - 0.1 for row in old], values, kl_coef=0.1)
        found.append(
            [
                *old,
                *values,
                *gradients(policy, lambda: policy.update(experience, step=0)),  # noqa: B023
                *gradients(critic, lambda: critic.update(experience, step=0)),  # noqa: B023
            ]
        )
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

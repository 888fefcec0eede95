"""What the builder hands to the actors, and what a plan promises about memory."""

from __future__ import annotations

import pytest

from actors.build import ppo_actors
from actors.plan import estimate_memory
from alignment.config import ClusterConfig, PpoRunConfig

REWARD = {"functions": [{"name": "text:finished_sentence"}]}


@pytest.mark.parametrize(("warmup", "policy_updates"), [(0, 80), (3, 56), (9, 8)])
def test_each_schedule_counts_the_steps_that_its_model_takes_part_in(warmup, policy_updates):
    """10 steps of 2 epochs over 16 sequences in minibatches of 4."""
    config = PpoRunConfig.model_validate(
        {
            "run": {"num_steps": 10},
            "critic": {"warmup_steps": warmup},
            "reward": REWARD,
            "ppo": {"rollout_batch_size": 8, "num_samples_per_prompt": 2, "minibatch_size": 4, "ppo_epochs": 2},
        }
    )
    actors = ppo_actors(config, ClusterConfig(), model_path="p", critic_path="c")
    assert actors["policy"].total_updates == policy_updates
    assert actors["critic"].total_updates == 80


@pytest.mark.parametrize(("dtype", "trained", "frozen"), [("float32", 16, 4), ("bfloat16", 18, 2)])
def test_memory_counts_masters(dtype, trained, frozen):
    """1e9 weights, full policy and LoRA critic, each role in its own process."""
    config = PpoRunConfig.model_validate(
        {"model": {"dtype": dtype}, "critic": {"adapter": {"r": 8}}, "reward": {"model": "m"}}
    )
    lines = estimate_memory(config, ClusterConfig(colocate=()), 10**9).splitlines()
    found = {line.split()[2]: float(line.split()[3]) for line in lines}
    assert found == {
        "policy": trained,
        "critic": frozen,
        "reference": frozen,
        "reward_model": frozen,
        "rollout": frozen,
    }

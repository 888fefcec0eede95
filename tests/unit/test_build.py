"""What the builder hands to the actors."""

from __future__ import annotations

import pytest

from actors.build import ppo_actors
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

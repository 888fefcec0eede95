"""Steps in which the critic learns alone: the schedule of the policy waits, and nothing unseen is logged."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch

from actors.build import ppo_actors, ppo_roles
from actors.launch import local_groups
from alignment.config import ClusterConfig, PpoRunConfig
from alignment.data.chat import load_tokenizer
from alignment.data.prompts import load_prompts
from alignment.loops.ppo import PpoState, train_ppo, train_ppo_one_pass
from alignment.loops.run import Run
from alignment.run_directory import RunDirectory

WARMUP, STEPS, LR, FLOOR = 2, 5, 1e-4, 0.1


@pytest.fixture(autouse=True)
def _same_umask_afterwards():
    before = os.umask(0o022)
    yield
    os.umask(before)


def rows_of(tiny, folder, train):
    config = PpoRunConfig.model_validate(
        {
            "run": {"num_steps": STEPS, "trackers": []},
            "data": {"source": {"path": f"{tiny}/prompts.jsonl"}, "held_out": 4},
            "model": {"path": str(tiny / "policy")},
            "policy": {"optimizer": {"lr": LR, "warmup_ratio": 0, "min_lr_ratio": FLOOR}},
            "critic": {"warmup_steps": WARMUP},
            "reward": {"functions": [{"name": "text:finished_sentence"}]},
            "rollout": {"engine": "transformers", "max_new_tokens": 8},
            "ppo": {"rollout_batch_size": 4, "minibatch_size": 4},
        }
    )
    path = config.model.path
    actors = ppo_actors(config, ClusterConfig(), model_path=path, critic_path=path)
    with local_groups(actors, ClusterConfig()) as groups:
        roles = ppo_roles(groups)
        run = Run(RunDirectory(folder), num_steps=STEPS, checkpoint_every=STEPS, keep_checkpoints=1, trackers=())
        train(
            config,
            load_prompts(config.data, load_tokenizer(path)).train,
            policy=roles.policy,
            critic=roles.critic,
            reference=roles.reference,
            reward=roles.reward,
            rollout=Detuned(roles.rollout),
            run=run,
            state=PpoState.start(config),
        )
        run.close()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Detuned:
    """A sampler whose log-probabilities are 0.001 too low, so that a gap of 0 cannot be a measured one."""

    def __init__(self, rollout):
        self.rollout = rollout

    def __getattr__(self, name):
        return getattr(self.rollout, name)

    def generate(self, *args, **kwargs):
        pending = self.rollout.generate(*args, **kwargs)
        for rollout in pending.result():
            lowered = tuple((torch.tensor(rollout.rollout_logprobs) - 0.001).tolist())
            object.__setattr__(rollout, "rollout_logprobs", lowered)
        return pending


@pytest.mark.parametrize("train", [train_ppo, train_ppo_one_pass])
def test_critic_warm_up(tiny, tmp_path, train):
    rows = rows_of(tiny, tmp_path / "run", train)
    # Before the policy's first step it only learns; its decay then runs from the peak to the floor.
    rates = [row.get("ppo/lr") for row in rows]
    assert rates[:WARMUP] == [None] * WARMUP
    assert rates[WARMUP:] == pytest.approx([LR, LR * (1 + FLOOR) / 2, LR * FLOOR])
    assert all("critic/lr" in row for row in rows)

    for row in rows:
        assert (row["rollout/logprob_gap"], row["rollout/logprob_gap_max"]) == pytest.approx((0.001, 0.001), rel=1e-2)
        assert row["rollout/ratio_mean"] == pytest.approx(math.exp(0.001), 1e-5)
        assert row["rollout/effective_sample_size"] == pytest.approx(1.0, 1e-4)

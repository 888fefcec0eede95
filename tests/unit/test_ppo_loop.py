"""The loop with all five roles in this process: a policy too far from its reference stops the run in time."""

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


@pytest.fixture(autouse=True)
def _same_umask_afterwards():
    before = os.umask(0o022)
    yield
    os.umask(before)


def config_of(tiny, *, num_steps: int, limit: float | None) -> PpoRunConfig:
    return PpoRunConfig.model_validate(
        {
            "run": {"num_steps": num_steps, "trackers": []},
            "data": {"source": {"path": f"{tiny}/prompts.jsonl"}, "held_out": 4},
            "model": {"path": str(tiny / "policy")},
            "reward": {"functions": [{"name": "text:finished_sentence"}]},
            "rollout": {"max_new_tokens": 8},
            "kl": {"limit": limit},
            "ppo": {"rollout_batch_size": 4, "minibatch_size": 4},
        }
    )


class Loop:
    """A run of `train` with its five roles, one call after the other."""

    def __init__(self, tiny, folder, train, *, limit: float | None) -> None:
        config = config_of(tiny, num_steps=1, limit=limit)
        path = config.model.path
        self.tiny, self.train, self.limit = tiny, train, limit
        self.prompts = load_prompts(config.data, load_tokenizer(path)).train
        self.actors = ppo_actors(config, ClusterConfig(), model_path=path, critic_path=path)
        with local_groups(self.actors, ClusterConfig()) as groups:
            self.roles = ppo_roles(groups)
        self.state = PpoState.start(config)
        self.directory = RunDirectory(folder)
        self.run = Run(self.directory, num_steps=2, checkpoint_every=1, keep_checkpoints=2, trackers=())

    def up_to(self, num_steps: int) -> None:
        self.train(
            config_of(self.tiny, num_steps=num_steps, limit=self.limit),
            self.prompts,
            policy=self.roles.policy,
            critic=self.roles.critic,
            reference=self.roles.reference,
            reward=self.roles.reward,
            rollout=self.roles.rollout,
            run=self.run,
            state=self.state,
        )

    def move_reference(self, noise: float) -> None:
        """Does to the KL what a policy that runs off does."""
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for _, parameter in self.actors["reference"].model.named_parameters():
                parameter += noise * torch.randn(parameter.shape, generator=generator)

    def metrics(self) -> list[dict]:
        return [json.loads(line) for line in self.directory.metrics.read_text().splitlines()]


@pytest.mark.parametrize("train", [train_ppo, train_ppo_one_pass])
@pytest.mark.parametrize(
    ("noise", "limit", "stops"),
    [(0.0, 5.0, False), (0.3, 5.0, True), (0.3, None, False), (math.nan, 5.0, True)],
    ids=["near", "far", "far, no limit", "not a number"],
)
def test_a_step_beyond_the_kl_limit_is_logged_but_never_committed(tiny, tmp_path, train, noise, limit, stops):
    loop = Loop(tiny, tmp_path / "run", train, limit=limit)
    loop.up_to(1)
    loop.move_reference(noise)
    if stops:
        with pytest.raises(RuntimeError, match=r"step 1: got a KL of .*expected at most kl\.limit=5"):
            loop.up_to(2)
    else:
        loop.up_to(2)
    assert loop.run.store.complete() == ([1] if stops else [1, 2])
    rows = loop.metrics()
    assert [row["step"] for row in rows] == [0, 1]
    kl = rows[1]["kl/per_sequence"]
    assert kl is None if math.isnan(noise) else (kl > 5) == (noise > 0)  # JSON has no NaN


@pytest.mark.parametrize("train", [train_ppo, train_ppo_one_pass])
def test_the_gap_between_sampler_and_trainer_is_logged_under_one_name(tiny, tmp_path, train):
    loop = Loop(tiny, tmp_path / "run", train, limit=None)
    loop.up_to(1)
    (row,) = loop.metrics()
    assert [name for name in row if name.endswith("/logprob_gap")] == ["rollout/logprob_gap"]
    assert 0 < row["rollout/logprob_gap"] < 1e-5  # two ways to compute the same numbers in float32

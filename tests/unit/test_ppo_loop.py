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


def config_of(tiny, *, num_steps: int, limit: float | None, **rollout) -> PpoRunConfig:
    return PpoRunConfig.model_validate(
        {
            "run": {"num_steps": num_steps, "trackers": []},
            "data": {"source": {"path": f"{tiny}/prompts.jsonl"}, "held_out": 4},
            "model": {"path": str(tiny / "policy")},
            "reward": {"functions": [{"name": "text:finished_sentence"}]},
            "rollout": {"engine": "transformers", "max_new_tokens": 8, **rollout},
            "kl": {"limit": limit},
            "ppo": {"rollout_batch_size": 4, "minibatch_size": 4},
        }
    )


class Loop:
    """A run of `train` with its five roles, one call after the other."""

    def __init__(self, tiny, folder, train, *, limit: float | None = None, **rollout) -> None:
        config = config_of(tiny, num_steps=1, limit=limit, **rollout)
        path = config.model.path
        self.tiny, self.train, self.limit, self.rollout = tiny, train, limit, rollout
        self.prompts = load_prompts(config.data, load_tokenizer(path)).train
        self.actors = ppo_actors(config, ClusterConfig(), model_path=path, critic_path=path)
        with local_groups(self.actors, ClusterConfig()) as groups:
            self.roles = ppo_roles(groups)
        self.state = PpoState.start(config)
        self.directory = RunDirectory(folder)
        self.run = Run(self.directory, num_steps=2, checkpoint_every=1, keep_checkpoints=2, trackers=())

    def up_to(self, num_steps: int) -> None:
        self.train(
            config_of(self.tiny, num_steps=num_steps, limit=self.limit, **self.rollout),
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

    def sample_at(self, temperature: float) -> None:
        """The engine is told another temperature than the trainer."""
        sampler = self.actors["rollout"]
        sampler.config = sampler.config.model_copy(update={"temperature": temperature})

    def weights(self, role: str) -> list[torch.Tensor]:
        return [parameter.detach().clone() for _, parameter in self.actors[role].model.named_parameters()]

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


def unchanged(before, after) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("train", [train_ppo, train_ppo_one_pass])
def test_a_sampler_at_another_temperature_stops_a_later_step_before_its_update(tiny, tmp_path, train):
    loop = Loop(tiny, tmp_path / "run", train)
    loop.up_to(1)
    before = {role: loop.weights(role) for role in ("policy", "critic")}
    loop.sample_at(1.5)
    with pytest.raises(RuntimeError, match=r"step 1: got a mean gap of .*logprob_gap_limit=0\.05.*temperature"):
        loop.up_to(2)
    assert unchanged(before["policy"], loop.weights("policy"))
    assert loop.actors["policy"].learner.engine.num_updates == 1
    # In one pass the critic's step comes first, in memory alone.
    assert unchanged(before["critic"], loop.weights("critic")) == (train is train_ppo)
    assert loop.actors["rollout"].engine.weight_version == 1
    assert loop.run.store.complete() == [1]
    assert [row["step"] for row in loop.metrics()] == [0]


@pytest.mark.parametrize("train", [train_ppo, train_ppo_one_pass])
def test_a_sampler_at_another_temperature_never_starts(tiny, tmp_path, train, capsys):
    loop = Loop(tiny, tmp_path / "run", train)
    before = {role: loop.weights(role) for role in ("policy", "critic")}
    loop.sample_at(1.5)
    with pytest.raises(RuntimeError, match=r"invariants: got \['rollout - trainer log-probability gap'\] broken"):
        loop.up_to(1)
    assert all(unchanged(weights, loop.weights(role)) for role, weights in before.items())
    assert loop.run.store.complete() == []
    printed = "".join(capsys.readouterr())
    assert "FAIL  rollout - trainer log-probability gap" in printed
    assert "look at: another temperature in the engine" in printed


@pytest.mark.parametrize("train", [train_ppo, train_ppo_one_pass])
@pytest.mark.parametrize("kind", ["token_tis", "sequence_tis", "icepop"])
def test_a_limit_that_lets_a_disagreeing_sampler_through_leaves_it_to_the_weights(tiny, tmp_path, train, kind):
    loop = Loop(
        tiny, tmp_path / "run", train, logprob_gap_limit=5.0, correction={"kind": kind, "cap": 1.1, "low": 0.9}
    )
    loop.up_to(1)
    loop.sample_at(1.5)
    loop.up_to(2)
    agreeing, disagreeing = loop.metrics()
    changed = f"ppo/correction_{'masked' if kind == 'icepop' else 'truncated'}_fraction"
    for name in ("rollout/ratio_mean", "rollout/effective_sample_size", "ppo/correction_weight_mean"):
        assert agreeing[name] == pytest.approx(1, abs=1e-4)
    assert agreeing[changed] == 0
    assert disagreeing["rollout/logprob_gap"] > 0.05
    assert disagreeing["rollout/effective_sample_size"] < 0.99
    assert disagreeing[changed] > 0
    assert disagreeing["ppo/correction_weight_mean"] != pytest.approx(1, abs=1e-3)

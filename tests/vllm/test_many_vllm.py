"""Two real vLLM engines on local Ray: the samples of one, also when the process of one is killed while it samples."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import ray
from tiny import write_tiny_model

from actors.handles import PolicyHandle, RolloutHandle
from actors.launch import ray_groups
from actors.policy import PolicyActor
from actors.rollout import RolloutActor
from alignment.config import ClusterConfig, ModelConfig, PolicyConfig, PpoConfig, RolloutConfig, VllmConfig
from alignment.types import Prompt

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

# The processes cannot import a test module.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

PROMPTS = [Prompt(id=f"p{i}", messages=(), prompt_ids=tuple(range(4, 4 + 3 + 37 * i % 101))) for i in range(12)]


class FaultyRollout(RolloutActor):
    """The engine's actor; its process dies after some tokens when a file of its name says so."""

    faults: Path

    def setup(self, peers):
        super().setup(peers)
        engine = self.engine.llm.llm_engine
        self.steps, self.step = 0, engine.step
        engine.step = self.counted_step

    def counted_step(self):
        self.steps += 1
        if self.steps == 5 and (self.faults / str(os.getpid())).exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return self.step()

    def generate(self, prompts, **settings):
        self.steps = 0
        with (self.faults / "calls").open("a") as file:
            file.write(f"{os.getpid()}\n")
        return super().generate(prompts, **settings)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    path = str(write_tiny_model(tmp_path_factory.mktemp("model") / "m", hidden_size=64, num_attention_heads=2))
    model = ModelConfig(path=path)
    rollout = FaultyRollout(
        model_path=path,
        model=model,
        rollout=RolloutConfig(
            engine="vllm", max_new_tokens=16, max_batch=2, vllm=VllmConfig(max_model_len=256, kv_cache_gb=0.1)
        ),
        seed=1,
    )
    rollout.faults = tmp_path_factory.mktemp("faults")
    policy = PolicyActor(
        model_path=path,
        model=model,
        policy=PolicyConfig(),
        ppo=PpoConfig(rollout_batch_size=4, minibatch_size=4),
        temperature=1.0,
        total_updates=1,
        seed=1,
    )
    cluster = ClusterConfig.model_validate({"rollout": {"num_engines": 2, "threads_per_worker": 1}, "colocate": []})
    with ray_groups({"policy": policy, "rollout": rollout}, cluster) as groups:
        yield PolicyHandle(groups["policy"]), RolloutHandle(groups["rollout"]), rollout.faults


def samples(rollouts) -> list[tuple]:
    return [(r.prompt.id, r.sample_index, r.response_ids, r.finish_reason, r.weight_version) for r in rollouts]


def test_two_engines_sample_what_one_does_also_when_one_is_killed(started):
    policy, handle, faults = started
    assert policy.send_weights(handle, version=3).result() == 3
    alone = handle.group.only(0).scatter("rollout", "generate", PROMPTS, step=4, num_samples=2).result()
    assert [(r.prompt.id, r.sample_index) for r in alone] == [(p.id, k) for p in PROMPTS for k in range(2)]
    assert samples(handle.generate(PROMPTS, step=4, num_samples=2).result()) == samples(alone)

    calls = faults / "calls"
    calls.unlink()
    pid = ray.get(handle.group.workers[1].pid.remote())
    (faults / str(pid)).touch()
    assert samples(handle.generate(PROMPTS, step=4, num_samples=2).result()) == samples(alone)
    assert handle.metrics()["rollout/engine_restarts_count"] == 1
    # Four shares of six; the one that was sampled when its engine died was sampled again.
    assert len(calls.read_text().split()) == 5
    assert calls.read_text().split().count(str(pid)) == 1

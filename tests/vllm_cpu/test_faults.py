"""Faults planted into a run that samples with real vLLM: each trips its alarm before anything learns from it."""

from __future__ import annotations

import os

import pytest
from tiny import write_prompts, write_tiny_model
from tiny_loop import Loop

from actors.local import LocalGroup
from actors.policy import PolicyActor
from alignment.config import AdapterConfig, ModelConfig, PolicyConfig, PpoConfig
from alignment.loops.ppo import train_ppo

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

SETTINGS = {"engine": "vllm", "vllm": {"max_model_len": 256, "kv_cache_gb": 0.1}}


@pytest.fixture(autouse=True)
def _same_umask_afterwards():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    write_tiny_model(folder / "policy", hidden_size=64, num_attention_heads=2)
    write_prompts(folder / "prompts.jsonl")
    return folder


@pytest.fixture(params=["adapter", "merged", "full"])
def loop(request, folder, tmp_path):
    """A run after its first step. The rate is large enough that every step moves log-probabilities visibly."""
    policy = {"optimizer": {"lr": 1e-2}, "adapter": {"r": 0 if request.param == "full" else 4}}
    lora_sync = "auto" if request.param == "full" else request.param
    loop = Loop(folder, tmp_path / "run", train_ppo, policy=policy, lora_sync=lora_sync, **SETTINGS)
    loop.up_to(1)
    yield loop
    loop.stack.close()


def stops(loop: Loop, message: str, *, complete: list[int]) -> None:
    with pytest.raises(RuntimeError, match=message):
        loop.up_to(3)
    assert loop.run.store.complete() == complete


def test_an_undisturbed_run_goes_on(loop):
    loop.up_to(3)
    assert max(row["rollout/logprob_gap"] for row in loop.metrics()) < 1e-4


def test_a_sync_that_is_skipped(loop, monkeypatch):
    nothing = loop.roles.rollout.group.call("rollout", "num_receivers")
    monkeypatch.setattr(loop.roles.policy, "send_weights", lambda *_, **__: nothing)
    stops(loop, r"got answers sampled by weight versions \[1\], expected 2 alone", complete=[1, 2])


def test_a_sync_that_is_acknowledged_and_brings_the_old_weights(loop, monkeypatch):
    """The right version, and hashes that fit what came: only the probe can tell."""
    policy = loop.actors["policy"]
    if loop.actors["rollout"].engine.sync_kind == "adapter":
        kept = policy.export_adapter(version=2)
        monkeypatch.setattr(policy, "export_adapter", lambda *, version: kept)
    else:
        kept = [policy.export_bucket(version=2, index=i, whole=True) for i in range(policy.plan_sync(whole=True))]
        monkeypatch.setattr(policy, "export_bucket", lambda *, index, **_: kept[index])
    stops(loop, r"weight sync of version 2, probe prompt: .*stale or swapped weights", complete=[1])


def test_another_temperature(loop):
    loop.sample_at(1.5)
    stops(loop, r"step 1: got a mean gap of .*logprob_gap_limit=0\.005.*temperature", complete=[1])


@pytest.mark.parametrize("loop", ["adapter"], indirect=True)
def test_a_swapped_adapter(loop, folder, monkeypatch):
    path = str(folder / "policy")
    other = PolicyActor(
        model_path=path,
        model=ModelConfig(path=path),
        policy=PolicyConfig(adapter=AdapterConfig(r=4)),
        ppo=PpoConfig(rollout_batch_size=4, minibatch_size=4),
        temperature=1.0,
        total_updates=1,
        seed=7,
    )
    LocalGroup({"policy": other}).start().result()
    monkeypatch.setattr(loop.actors["policy"], "export_adapter", other.export_adapter)
    stops(loop, r"weight sync of version 2, probe prompt: .*stale or swapped weights", complete=[1])

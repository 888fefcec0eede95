"""An adapter on the engine is the adapter on the trainer is the merged model, and nothing else passes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny import write_tiny_model

from actors.handles import PolicyHandle, RolloutHandle
from actors.local import LocalGroup
from actors.policy import PolicyActor
from actors.rollout import RolloutActor, rank_of_sync
from alignment.config import AdapterConfig, ModelConfig, PolicyConfig, PpoConfig, RolloutConfig, VllmConfig
from alignment.types import Prompt

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

PROMPTS = [Prompt(id=str(i), messages=(), prompt_ids=tuple(range(5 + i, 30 + 2 * i))) for i in range(8)]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("lora") / "model", hidden_size=64, num_attention_heads=2))


def started(handle, actor):
    group = LocalGroup({handle.role: actor})
    group.start().result()
    return handle(group)


ADAPTER = AdapterConfig(r=5, alpha=10)  # no kernel has this rank: room for 8 is made


def make_policy(path: str, seed: int, adapter: AdapterConfig = ADAPTER) -> PolicyHandle:
    actor = PolicyActor(
        model_path=path,
        model=ModelConfig(path=path),
        policy=PolicyConfig(adapter=adapter),
        ppo=PpoConfig(rollout_batch_size=4, minibatch_size=4),
        temperature=1.0,
        total_updates=1,
        seed=seed,
    )
    handle = started(PolicyHandle, actor)
    train(handle, seed)
    return handle


@torch.no_grad()
def train(policy: PolicyHandle, seed: int, scale: float = 0.1) -> None:
    """Move every adapter matrix, as an update would: the change to a weight is about as large as the weight."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.group.host.actors["policy"].model.model.named_parameters():
        if "lora_" in name:
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def rollout_actor(path: str, lora_sync: str, adapter: AdapterConfig) -> RolloutActor:
    return RolloutActor(
        model_path=path,
        model=ModelConfig(path=path),
        rollout=RolloutConfig(
            engine="vllm",
            lora_sync=lora_sync,
            max_new_tokens=12,
            ignore_eos=True,
            vllm=VllmConfig(max_model_len=256, kv_cache_gb=0.1),
        ),
        seed=1,
        adapter=adapter,
    )


@pytest.fixture(scope="module")
def engines(path):
    """The same engine twice: one is sent adapters, one merged weights."""
    handles = {kind: started(RolloutHandle, rollout_actor(path, kind, ADAPTER)) for kind in ("adapter", "merged")}
    assert (handles["adapter"].sync_kind(), handles["merged"].sync_kind()) == ("adapter", "whole")
    yield handles
    for handle in handles.values():
        handle.group.host.actors["rollout"].engine.close()


@pytest.fixture(scope="module")
def policy(path):
    return make_policy(path, seed=1)


def worst_gap(policy: PolicyHandle, rollouts) -> float:
    own = policy.logprobs(rollouts).result()
    return max(float((torch.tensor(r.rollout_logprobs) - p).abs().max()) for r, p in zip(rollouts, own, strict=True))


def test_adapter_sync_equals_merged_sync_equals_the_trainer(engines, policy):
    stale = engines["adapter"].generate(PROMPTS, step=0).result()
    assert worst_gap(policy, stale) > 0.1
    for version in (1, 2):
        train(policy, seed=10 + version)
        sampled = {}
        for kind, engine in engines.items():
            assert policy.send_weights(engine, version=version).result() == version
            sampled[kind] = engine.generate(PROMPTS, step=0).result()
            gap = worst_gap(policy, sampled[kind])
            print(f"\n{kind}: largest gap {gap:.1e}")
            assert gap < 1e-4
        assert [r.response_ids for r in sampled["adapter"]] == [r.response_ids for r in sampled["merged"]]
        assert [r.response_ids for r in sampled["adapter"]] != [r.response_ids for r in stale]


def test_another_policys_adapter_fails_the_probe(engines, policy, path):
    actor = engines["adapter"].group.host.actors["rollout"]
    other = make_policy(path, seed=2)
    actor.receive_adapter(other.group.host.actors["policy"].export_adapter(version=5))
    with pytest.raises(RuntimeError, match="stale or swapped"):
        actor.check_probe(policy.group.host.actors["policy"].probe(version=5))
    assert policy.send_weights(engines["adapter"], version=6).result() == 6


def test_a_sync_that_was_skipped_is_an_old_version(engines, policy):
    actor = engines["adapter"].group.host.actors["rollout"]
    assert policy.send_weights(engines["adapter"], version=7).result() == 7
    with pytest.raises(RuntimeError, match="got version 7 in the engine, expected 8"):
        actor.check_probe(policy.group.host.actors["policy"].probe(version=8))


def test_a_flipped_byte_in_the_adapter_is_refused(engines, policy):
    actor = engines["adapter"].group.host.actors["rollout"]
    update = policy.group.host.actors["policy"].export_adapter(version=9)
    name = "adapter_model.safetensors"
    data = bytearray(update.files[name])
    data[-5] ^= 1
    with pytest.raises(RuntimeError, match="version 9, adapter"):
        actor.receive_adapter(dataclasses.replace(update, files={**update.files, name: bytes(data)}))
    with pytest.raises(RuntimeError, match="no end"):
        engines["adapter"].generate(PROMPTS[:1], step=0).result()
    assert policy.send_weights(engines["adapter"], version=9).result() == 9


def test_an_engine_of_adapters_keeps_its_base(engines):
    with pytest.raises(ValueError, match="lora_sync: merged"):
        engines["adapter"].group.host.actors["rollout"].sleep(discard_weights=True)


def test_a_four_bit_policy_arrives_merged(path):
    pytest.importorskip("bitsandbytes")
    adapter = AdapterConfig(r=4, alpha=8, quantization="nf4")
    policy = make_policy(path, seed=3, adapter=adapter)
    engine = started(RolloutHandle, rollout_actor(path, "auto", adapter))
    assert engine.sync_kind() == "whole"
    assert worst_gap(policy, engine.generate(PROMPTS, step=0).result()) > 0.1
    assert policy.send_weights(engine, version=1).result() == 1
    assert worst_gap(policy, engine.generate(PROMPTS, step=0).result()) < 1e-4
    engine.group.host.actors["rollout"].engine.close()


@pytest.mark.parametrize(
    ("asked", "device", "quantization", "rank"),
    [
        ("auto", "cpu", "none", 0),
        ("auto", "cuda", "none", 5),
        ("auto", "cuda", "nf4", 0),
        ("adapter", "cpu", "none", 5),
    ],
)
def test_what_is_sent_of_an_adapter(asked, device, quantization, rank):
    adapter = AdapterConfig(r=5, quantization=quantization)
    assert rank_of_sync(RolloutConfig(lora_sync=asked), adapter, device) == rank

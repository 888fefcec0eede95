"""A real model: rounding between batch shapes, the gap to the trainer, and a whole sync between two actors."""

from __future__ import annotations

import time

import pytest
import torch

from actors.handles import PolicyHandle, RolloutHandle
from actors.local import LocalGroup
from actors.policy import PolicyActor
from actors.rollout import RolloutActor
from alignment.config import AdapterConfig, ModelConfig, PolicyConfig, PpoConfig, RolloutConfig, VllmConfig
from alignment.data.chat import load_tokenizer
from alignment.data.model_assets import resolve_model
from alignment.data.prompts import make_prompt

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

QUESTIONS = [
    "How is high blood pressure treated?",
    "What helps against hay fever?",
    "Name three symptoms of anemia.",
    "What is a normal resting heart rate?",
    "Why does a fever make one shiver?",
    "When should a cut be stitched?",
    "Is aspirin safe for children?",
    "What does an MRI show?",
]


@pytest.fixture(scope="module")
def path() -> str:
    return resolve_model("asset:smollm2-135m-instruct")


@pytest.fixture(scope="module")
def prompts(path):
    tokenizer = load_tokenizer(path)
    return [make_prompt(tokenizer, [{"role": "user", "content": question}]) for question in QUESTIONS]


@pytest.fixture(scope="module")
def policy(path):
    actor = PolicyActor(
        model_path=path,
        model=ModelConfig(path=path),
        policy=PolicyConfig(adapter=AdapterConfig(r=4)),
        ppo=PpoConfig(rollout_batch_size=4, minibatch_size=4),
        temperature=1.0,
        total_updates=1,
        seed=1,
    )
    group = LocalGroup({"policy": actor})
    group.start().result()
    return PolicyHandle(group)


@pytest.fixture(scope="module")
def rollout(path):
    actor = RolloutActor(
        model_path=path,
        model=ModelConfig(path=path),
        rollout=RolloutConfig(engine="vllm", max_new_tokens=32, vllm=VllmConfig(max_model_len=512, kv_cache_gb=0.5)),
        seed=1,
    )
    group = LocalGroup({"rollout": actor})
    group.start().result()
    yield RolloutHandle(group)
    actor.engine.close()


def policy_actor(policy) -> PolicyActor:
    return policy.group.host.actors["policy"]


def gaps(policy, rollouts) -> torch.Tensor:
    own = policy.logprobs(rollouts).result()
    return torch.cat([(torch.tensor(r.rollout_logprobs) - p).abs() for r, p in zip(rollouts, own, strict=True)])


@torch.no_grad()
def change(policy, scale: float) -> None:
    generator = torch.Generator().manual_seed(5)
    for name, parameter in policy_actor(policy).model.model.named_parameters():
        if "lora_" in name:
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def test_samples_do_not_depend_on_the_batch(rollout, prompts):
    together = rollout.generate(prompts, step=0, num_samples=2).result()
    again = rollout.generate(prompts[::-1], step=0, num_samples=1).result()[::-1]
    flips = sum(a.response_ids != b.response_ids for a, b in zip(together[::2], again, strict=True))
    assert flips == 0, f"{flips} of {len(again)} answers differ between a batch of 16 and one of 8"
    assert len({r.response_ids for r in together}) == len(together)


def test_the_gap_to_the_trainer_is_small(rollout, policy, prompts):
    rollouts = rollout.generate(prompts, step=1).result()
    gap = gaps(policy, rollouts)
    print(f"\nmean gap {gap.mean():.2e}, max {gap.max():.2e}")
    assert gap.mean() < 1e-4


def test_a_merged_sync_changes_the_answers_and_keeps_the_gap(rollout, policy, prompts):
    before = rollout.generate(prompts, step=2).result()
    change(policy, 0.02)
    assert gaps(policy, before).mean() > 0.01  # stale weights are seen
    start = time.perf_counter()
    assert policy.send_weights(rollout, version=3).result() == 3
    print(f"\nsync {time.perf_counter() - start:.2f} s")
    after = rollout.generate(prompts, step=2).result()
    assert {r.weight_version for r in after} == {3}
    assert [r.response_ids for r in after] != [r.response_ids for r in before]
    assert gaps(policy, after).mean() < 1e-4


def test_a_skipped_bucket_fails_the_sync(rollout, policy, prompts):
    actor, sender = rollout.group.host.actors["rollout"], policy_actor(policy)
    count = sender.plan_sync(whole=True)
    actor.begin_sync(version=9, buckets=count)
    for index in range(count - 1):
        actor.receive_bucket(sender.export_bucket(version=9, index=index, whole=True))
    with pytest.raises(RuntimeError, match=f"got {count - 1} of {count} buckets"):
        actor.finish_sync(sender.probe(version=9), version=9)
    with pytest.raises(RuntimeError, match="no end"):
        rollout.generate(prompts[:1], step=3).result()
    assert policy.send_weights(rollout, version=9).result() == 9


def test_weights_other_than_the_trainers_fail_the_probe(rollout, policy):
    """Every byte arrives, but the trainer has moved on meanwhile."""
    actor, sender = rollout.group.host.actors["rollout"], policy_actor(policy)
    count = sender.plan_sync(whole=True)
    actor.begin_sync(version=10, buckets=count)
    for index in range(count):
        actor.receive_bucket(sender.export_bucket(version=10, index=index, whole=True))
    change(policy, 0.01)
    with pytest.raises(RuntimeError, match="version 10, probe prompt"):
        actor.finish_sync(sender.probe(version=10), version=10)

"""Adapters in whole runs: PPO with every kind that can be sent, critics with the others, and what a config refuses."""

from __future__ import annotations

import pytest
import torch
from adapter_runs import IDS, named
from tiny_learners import rollouts_of
from tiny_loop import Loop

from actors.critic import CriticActor
from actors.reward_training import RewardTrainingActor
from actors.rollout import rank_of_sync
from alignment.config import (
    AdapterConfig,
    CriticConfig,
    ModelConfig,
    PpoConfig,
    PpoRunConfig,
    RewardModelRunConfig,
    RewardModelTrainingConfig,
    RoleConfig,
    RolloutConfig,
)
from alignment.config.splitting import refuse_splitting
from alignment.loops.ppo import train_ppo, train_ppo_one_pass
from alignment.types import PreferencePair

SENT = {
    "rslora": {"r": 4},
    "dora": {"r": 4},
    "pissa": {"r": 4},
    "adalora": {"r": 4, "budget": {"target_r": 2, "final_share": 0.5}},
    "ia3": {},
    "half": {"half_round": 2},
}


@pytest.mark.parametrize("kind", SENT)
def test_ppo_samples_from_what_it_has_trained(tiny, tmp_path, kind):
    policy = {"adapter": {"type": kind, **SENT[kind]}, "optimizer": {"lr": 1e-2}}
    loop = Loop(tiny, tmp_path / "run", train_ppo, policy=policy)
    sampler = loop.actors["rollout"].engine.model
    start = named(sampler)
    loop.up_to(3)
    rows = loop.metrics()
    # Rounding, and pissa's weights as they are put together again.
    assert max(row["rollout/logprob_gap"] for row in rows) < 1e-5
    assert abs(rows[0]["kl/per_sequence"]) < 1e-4
    assert rows[-1]["kl/per_token_k3"] > 1e-6
    assert any(not torch.equal(tensor, start[name]) for name, tensor in named(sampler).items())
    if kind == "adalora":
        assert [row["adalora/rank_total"] for row in rows][-1] == 14 * 2
    if kind == "half":
        assert [row["half/round"] for row in rows] == [0, 0, 1]


@pytest.mark.parametrize("kind", ["dora", "adalora"])
def test_one_pass_trains_them_alike(tiny, tmp_path, kind):
    policy = {"adapter": {"type": kind, **SENT[kind]}, "optimizer": {"lr": 1e-2}}
    ends = []
    for name, train in (("plain", train_ppo), ("one pass", train_ppo_one_pass)):
        loop = Loop(tiny, tmp_path / name, train, policy=policy)
        loop.up_to(2)
        ends.append(loop.weights("policy"))
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("kind", ["prefix", "p_tuning", "bottleneck", "adalora", "half", "prompt"])
def test_a_critic_learns_by_any_of_them(tiny, kind):
    settings = {"r": 12} if kind in ("bottleneck", "adalora") else {}
    text = {"virtual_tokens": {"text": "value"}} if kind == "prompt" else {}
    critic = CriticActor(
        model_path=str(tiny / "policy"),
        model=ModelConfig(path=str(tiny / "policy")),
        critic=CriticConfig(adapter=AdapterConfig(type=kind, **settings, **text), optimizer={"lr": 1e-2}),
        ppo=PpoConfig(),
        total_updates=8,
        seed=1,
    )
    critic.setup({})
    rollouts = rollouts_of(6)
    rewards = [torch.ones(len(rollout.response_ids)) for rollout in rollouts]
    losses = [
        critic.learner.fit(rollouts, rewards, gamma=1.0, gae_lambda=1.0)[1]["critic/value_loss"] for _ in range(8)
    ]
    assert losses[-1] < 0.9 * losses[0]


def test_a_reward_model_learns_by_adalora_and_is_written_whole(tiny, tmp_path):
    actor = RewardTrainingActor(
        model_path=str(tiny / "policy"),
        model=ModelConfig(path=str(tiny / "policy")),
        training=RewardModelTrainingConfig(
            adapter=AdapterConfig(type="adalora", r=4, budget={"target_r": 2}), optimizer={"lr": 1e-2}
        ),
        total_updates=10,
        seed=1,
    )
    actor.setup({})
    ids = IDS.tolist()
    pairs = [
        PreferencePair(id=str(i), prompt_ids=tuple(ids[0][:3]), chosen_ids=(5, 6, i), rejected_ids=(9, 8, 7 + i))
        for i in range(4)
    ]
    rows = [actor.learner.update(pairs, step=step) for step in range(10)]
    assert rows[-1]["reward_model/loss"] < rows[0]["reward_model/loss"]
    assert rows[-1]["adalora/rank_total"] == 14 * 2
    actor.export(tmp_path / "final")
    assert (tmp_path / "final" / "model.safetensors").exists()


def ppo(**sections):
    return PpoRunConfig.model_validate({"reward": {"functions": [{"name": "text:finished_sentence"}]}, **sections})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "dora"}, r"adapter.r: got 0 with adapter.type=dora, expected a rank above 0; set adapter.r"),
        ({"type": "bottleneck"}, r"adapter.r: got 0 with adapter.type=bottleneck"),
        ({"type": "adalora", "r": 8}, r"adapter.budget.target_r: got 8 with adapter.r=8, expected less: .*raise"),
        (
            {"type": "adalora", "r": 12, "budget": {"warmup_share": 0.5, "final_share": 0.5}},
            r"budget: got warmup_share 0.5 \+ final_share 0.5, expected less than 1: .*lower one",
        ),
        (
            {"type": "p_tuning", "virtual_tokens": {"text": "x"}},
            r"adapter.virtual_tokens.text: got one with adapter.type=p_tuning, expected prompt or p_tuning_v2",
        ),
        ({"type": "prefix", "last_layers": 2}, r"adapter.last_layers: got 2 with adapter.type=prefix, expected null"),
        ({"type": "lisa"}, r"Input should be 'lora', 'rslora'"),
        ({"type": "prefix", "virtual_tokens": {"num_tokens": 0}}, r"greater than 0"),
    ],
)
def test_an_adapter_that_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AdapterConfig(**settings)


def test_rank_is_read_where_there_is_one():
    assert not AdapterConfig().enabled
    assert AdapterConfig(r=1).enabled
    assert AdapterConfig(type="ia3").enabled
    assert AdapterConfig(type="prompt", r=3).enabled
    assert not AdapterConfig(type="half").enabled


@pytest.mark.parametrize("kind", ["bottleneck", "prefix", "p_tuning", "p_tuning_v2", "prompt"])
def test_what_no_engine_can_be_sent_is_refused_for_policies_and_reward_models(kind):
    adapter = {"type": kind, "r": 4}
    with pytest.raises(ValueError, match=rf"policy.adapter.type: got {kind}, expected one of lora.*rollout engines"):
        ppo(policy={"adapter": adapter})
    with pytest.raises(ValueError, match=rf"training.adapter.type: got {kind}, expected one of lora.*plain weights"):
        RewardModelRunConfig.model_validate({"training": {"adapter": adapter}})
    assert ppo(critic={"adapter": adapter}).critic.adapter.type == kind


def test_a_prefix_and_recomputed_layers_do_not_meet():
    critic = {"adapter": {"type": "prefix"}}
    with pytest.raises(ValueError, match=r"model.gradient_checkpointing: got true with critic.adapter.type=prefix"):
        ppo(critic=critic, model={"gradient_checkpointing": True})
    with pytest.raises(ValueError, match=r"model.batch_layout: got packed with critic.adapter.type=prefix"):
        ppo(critic=critic, model={"batch_layout": "packed"})
    ppo(critic={"adapter": {"type": "prompt"}}, model={"gradient_checkpointing": True})


@pytest.mark.parametrize(("kind", "alone"), [("lora", 4), ("rslora", 4), ("dora", 0), ("pissa", 0), ("ia3", 0)])
def test_vllm_is_sent_what_it_has(kind, alone):
    adapter = AdapterConfig(type=kind, r=4)
    assert rank_of_sync(RolloutConfig(), adapter, "cuda") == alone
    assert rank_of_sync(RolloutConfig(), adapter, "cpu") == 0
    assert rank_of_sync(RolloutConfig(lora_sync="merged"), adapter, "cuda") == 0
    if alone:
        assert rank_of_sync(RolloutConfig(lora_sync="adapter"), adapter, "cpu") == alone
    else:
        with pytest.raises(ValueError, match=rf"rollout.lora_sync: got adapter with policy.adapter.type={kind}"):
            ppo(policy={"adapter": {"type": kind, "r": 4}}, rollout={"lora_sync": "adapter"})


@pytest.mark.parametrize("kind", ["adalora", "half"])
def test_methods_that_need_whole_gradients_are_not_split(kind):
    adapter = AdapterConfig(type=kind, r=12)
    role = RoleConfig(num_workers=2, zero_stage=3)
    with pytest.raises(ValueError, match=rf"policy.zero_stage: got 3 with adapter.type={kind}, expected 0"):
        refuse_splitting("policy", role, adapter, dtype="float32")
    refuse_splitting("policy", RoleConfig(num_workers=2), adapter, dtype="float32")
    refuse_splitting("reference", role, adapter, dtype="float32")


@pytest.mark.parametrize("kind", ["dora", "pissa", "ia3", "adalora", "half", "prompt", "bottleneck"])
def test_deepspeed_trains_plain_factors_only(kind):
    role = RoleConfig(num_workers=2, engine="deepspeed", zero_stage=2)
    with pytest.raises(ValueError, match=rf"critic.engine: got deepspeed with adapter.type={kind}, expected torch"):
        refuse_splitting("critic", role, AdapterConfig(type=kind, r=12), dtype="float32")
    refuse_splitting("critic", role, AdapterConfig(type="rslora", r=12), dtype="float32")

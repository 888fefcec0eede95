"""Four-bit base weights: the right levels, one precision everywhere, and merges that compute the same."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from tiny import write_tiny_model
from tiny_loop import Loop

from actors.critic import CriticActor
from actors.reward_training import RewardTrainingActor
from alignment import adapters
from alignment.config import (
    AdapterConfig,
    CriticConfig,
    ModelConfig,
    PpoConfig,
    PpoRunConfig,
    RewardModelTrainingConfig,
    RolloutConfig,
)
from alignment.engines.torch import TorchEngine
from alignment.loops.ppo import train_ppo, train_ppo_one_pass
from alignment.models import HfModel, load_causal_lm, load_scalar_model
from alignment.quantization import dequantized, is_quantized, num_weights, stored_bytes

pytest.importorskip("bitsandbytes")

# The 16 levels of NF4, from appendix E of the QLoRA paper (arXiv 2305.14314).
LEVELS = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
BLOCK = 64
IDS = torch.arange(3, 40).unsqueeze(0)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("four-bit") / "model", hidden_size=64, num_attention_heads=2))


@pytest.fixture(scope="module")
def model(path) -> HfModel:
    """A four-bit model whose adapter, in the upper layer alone, has been moved."""
    model = load_causal_lm(path, quantization="nf4")
    adapters.attach_lora(model.model, r=4, alpha=8, last_layers=1, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model: HfModel) -> torch.Tensor:
    with torch.no_grad():
        return model.head(model.hidden(IDS, torch.ones_like(IDS)))


def test_every_weight_is_the_nearest_level_of_its_block(path):
    plain, rounded = load_causal_lm(path).model, load_causal_lm(path, quantization="nf4").model
    for name, parameter in rounded.named_parameters():
        original = plain.get_parameter(name).detach()
        if "_proj" not in name:  # embeddings, norms, head
            assert torch.equal(parameter, original), name
            continue
        assert is_quantized(parameter)
        blocks = original.reshape(-1, BLOCK)
        scale = blocks.abs().amax(1, keepdim=True)
        nearest = LEVELS[(blocks[..., None] / scale[..., None] - LEVELS).abs().argmin(-1)] * scale
        # Double quantisation stores the scale of a block in 8 bits: 1 part in 100 of the largest.
        error = (dequantized(parameter).reshape(-1, BLOCK) - nearest).abs().amax()
        assert error < 0.01 * scale.amax(), name


def test_four_bits_a_weight_and_a_byte_for_each_block(path):
    """And a float32 scale for 256 of those bytes, with one offset (Dettmers 2023, section 3)."""
    plain, rounded = load_causal_lm(path).model, load_causal_lm(path, quantization="nf4").model
    for name, parameter in rounded.named_parameters():
        count = plain.get_parameter(name).numel()
        assert num_weights(parameter) == count
        blocks = count // BLOCK
        expected = count // 2 + blocks + 4 * -(-blocks // 256) + 4 if is_quantized(parameter) else 4 * count
        assert stored_bytes(parameter) == expected, name


def test_scores_and_updates_see_the_same_weights(model):
    """Not so with the bfloat16 repacking that bitsandbytes does on a CPU where no gradient is asked for."""
    without = logits(model)
    hidden = model.hidden(IDS, torch.ones_like(IDS))
    assert hidden.requires_grad
    assert torch.allclose(model.head(hidden), without, atol=1e-6)
    assert all(dequantized(p).dtype == torch.float32 for p in model.model.parameters())


def test_merged_weights_compute_what_adapter_and_rounded_base_do(model, path, tmp_path):
    base = load_causal_lm(path)
    assert (logits(base) - logits(model)).abs().max() > 1e-2
    sent = dict(adapters.merged_weights(model.model))
    # The lower layer has no adapter and differs from the base by rounding.
    assert {name for name in sent if "_proj" in name} == {n for n, _ in base.model.named_parameters() if "_proj" in n}
    assert {name: tensor.nbytes for name, tensor in sent.items()} == adapters.merged_sizes(model.model)
    whole = dict(adapters.merged_weights(model.model, whole=True))
    assert {name: tensor.nbytes for name, tensor in whole.items()} == adapters.merged_sizes(model.model, whole=True)
    received = copy.deepcopy(base)
    received.model.load_state_dict(sent, strict=False)
    assert torch.allclose(logits(received), logits(model), atol=1e-5)

    adapters.export_merged(model.model, tmp_path / "merged")
    exported = load_causal_lm(str(tmp_path / "merged"))
    assert getattr(exported.model.config, "quantization_config", None) is None
    assert torch.allclose(logits(exported), logits(model), atol=1e-5)


def test_an_adapter_that_was_saved_comes_back_on_the_same_base(model, path, tmp_path):
    adapters.save_adapter(model.model, tmp_path / "adapter", base=path)
    again = load_causal_lm(path, quantization="nf4")
    adapters.attach_lora(again.model, r=4, alpha=8, last_layers=1, seed=9)
    adapters.load_adapter(again.model, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


def test_the_head_of_a_critic_stays_as_it_is(path):
    critic = load_scalar_model(path, head="zeros", quantization="nf4")
    assert not is_quantized(critic.model.score.weight)
    assert any(is_quantized(parameter) for parameter in critic.model.parameters())


def test_four_bits_without_an_adapter_are_refused():
    with pytest.raises(ValueError, match=r"adapter.quantization: got nf4 with adapter.r=0"):
        AdapterConfig(quantization="nf4")


def test_an_adapter_alone_is_not_sent_to_an_engine_with_another_base():
    with pytest.raises(ValueError, match=r"rollout.lora_sync: got adapter with policy.adapter.quantization=nf4"):
        PpoRunConfig.model_validate(
            {
                "model": ModelConfig(),
                "reward": {"functions": [{"name": "text:finished_sentence"}]},
                "policy": {"adapter": {"r": 4, "quantization": "nf4"}},
                "rollout": RolloutConfig(lora_sync="adapter"),
            }
        )


@pytest.mark.parametrize("train", [train_ppo, train_ppo_one_pass])
def test_a_four_bit_policy_learns_and_its_reference_is_its_start(tiny, tmp_path, train):
    umask = os.umask(0o022)
    try:
        policy = {"adapter": {"r": 4, "quantization": "nf4"}, "optimizer": {"lr": 1e-2}}
        loop = Loop(tiny, tmp_path / "run", train, policy=policy)
        with pytest.raises(RuntimeError, match="rollout - trainer log-probability gap"):
            loop.up_to(1)  # the sampler still has the base as it was before rounding
        loop.roles.policy.send_weights(loop.roles.rollout, version=0).result()
        loop.up_to(2)
        first, second = loop.metrics()
    finally:
        os.umask(umask)
    assert abs(first["kl/per_sequence"]) < (
        1e-5 if train is train_ppo_one_pass else 1e-12
    )  # one pass: the sampler against it
    assert max(row["rollout/logprob_gap"] for row in (first, second)) < 1e-4
    assert second["kl/per_token_k3"] > 0


def test_critic_and_reward_model_learn_on_four_bits(path):
    adapter = AdapterConfig(r=4, quantization="nf4")
    critic = CriticActor(
        model_path=path,
        model=ModelConfig(path=path),
        critic=CriticConfig(adapter=adapter),
        ppo=PpoConfig(),
        total_updates=1,
        seed=1,
    )
    reward = RewardTrainingActor(
        model_path=path,
        model=ModelConfig(path=path),
        training=RewardModelTrainingConfig(adapter=adapter),
        total_updates=1,
        seed=1,
    )
    for actor in (critic, reward):
        actor.setup({})
        names = {name for name, p in actor.model.model.named_parameters() if p.requires_grad}
        assert "score.weight" in names
        assert all("lora_" in name for name in names - {"score.weight"})
        scores = actor.model.head(actor.model.hidden(IDS, torch.ones_like(IDS)))
        scores.square().sum().backward()
        assert all(p.grad is not None for name, p in actor.model.model.named_parameters() if name in names)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "adalora", "ia3", "bottleneck", "prefix", "prompt"])
def test_every_adapter_that_leaves_the_weights_alone_learns_on_four_bits(path, kind, tmp_path):
    settings = {"r": 4} if kind in ("lora", "rslora", "dora", "bottleneck") else {}
    settings = {"r": 4, "budget": adapters.RankBudget(target_r=2)} if kind == "adalora" else settings
    model = load_causal_lm(path, quantization="nf4")
    adapters.attach(model, type=kind, seed=1, total_updates=10, **settings)
    engine = TorchEngine(model.named_parameters(), lr=1e-2, total_updates=10)
    packed = {name: p.data.clone() for name, p in model.named_parameters() if is_quantized(p)}
    assert packed
    losses = []
    for _ in range(10):
        loss = torch.nn.functional.cross_entropy(
            model.head(model.hidden(IDS, torch.ones_like(IDS)))[0, :-1], IDS[0, 1:]
        )
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert all(torch.equal(p.data, packed[name]) for name, p in model.named_parameters() if name in packed)
    with adapters.adapter_disabled(model.model):
        torch.testing.assert_close(logits(model), logits(load_causal_lm(path, quantization="nf4")))
    if not adapters.mergeable(kind):
        return
    adapters.export_merged(model.model, tmp_path / "merged")
    merged = load_causal_lm(str(tmp_path / "merged"))
    # What is written are the weights that were computed with, not rounded to four bits again.
    assert not any(is_quantized(p) for p in merged.parameters())
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)
    if kind in ("lora", "rslora", "dora"):
        name = "model.layers.0.mlp.down_proj.weight"
        blocks = merged.model.get_parameter(name).detach().reshape(-1, BLOCK)
        levels = {len(row.unique()) for row in blocks}
        assert max(levels) > len(LEVELS)


@pytest.mark.parametrize("kind", ["pissa", "half"])
def test_methods_that_change_the_weights_refuse_four_bits(path, kind):
    with pytest.raises(ValueError, match=rf"adapter.quantization: got nf4 with adapter.type={kind}, .* set quant"):
        AdapterConfig(type=kind, r=4, quantization="nf4")
    if kind == "pissa":
        with pytest.raises(ValueError, match=r"adapter.quantization: got four bits with adapter.type=pissa"):
            adapters.attach(load_causal_lm(path, quantization="nf4"), type=kind, r=4, seed=0, total_updates=1)

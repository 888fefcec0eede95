"""AdaLoRA: the budget falls as the paper says, goes where the gradients are, and what is pruned stays zero."""

from __future__ import annotations

import math

import pytest
import torch
from adapter_runs import IDS, attached, engine_of, loss_of, move, train
from tiny import write_tiny_model

from alignment import adapters, models
from alignment.engines.torch import TorchEngine
from alignment.learners.base import begin_update, finish_update

UPDATES, R, TARGET = 40, 6, 2
WARMUP, FINAL = 4, 12
NUM_MATRICES = 14
SETTINGS = {"r": R, "target_r": TARGET, "warmup_share": WARMUP / UPDATES, "final_share": FINAL / UPDATES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("adalora") / "model")


def budget_of(step: int) -> int:
    """Equation 12, with the cube of the share of the middle part that is left."""
    first, last = NUM_MATRICES * R, NUM_MATRICES * TARGET
    if step <= WARMUP:
        return first
    left = max(0.0, 1 - (step - WARMUP) / (UPDATES - FINAL - WARMUP))
    return int(last + (first - last) * left**3)


def layers(model):
    return {name: m for name, m in model.model.named_modules() if hasattr(m, "lora_E")}


def test_the_total_rank_follows_the_cubic_schedule_and_differs_by_matrix(folder):
    model, method = attached(folder, "adalora", total_updates=UPDATES, **SETTINGS)
    engine = engine_of(model, total_updates=UPDATES)
    assert len(layers(model)) == NUM_MATRICES
    totals = []
    for _ in range(UPDATES):
        train(model, engine, method, 1)
        totals.append(method.metrics()["adalora/rank_total"])
        for name, layer in layers(model).items():
            assert bool((layer.lora_E["default"][~method.kept[name]] == 0).all())
    assert totals == [budget_of(step) for step in range(1, UPDATES + 1)]
    assert totals[0] == NUM_MATRICES * R
    assert totals[-1] == NUM_MATRICES * TARGET
    ranks = [method.metrics()[f"adalora/rank/{name}"] for name in layers(model)]
    assert sum(ranks) == totals[-1]
    assert len(set(ranks)) > 1
    alive = [int((layer.lora_E["default"] != 0).sum()) for layer in layers(model).values()]
    assert alive == ranks


def test_rank_goes_to_the_matrix_that_the_loss_depends_on(folder):
    model, method = attached(folder, "adalora", total_updates=UPDATES, **SETTINGS)
    engine = engine_of(model, total_updates=UPDATES)
    important = "model.layers.1.mlp.down_proj"
    layer = layers(model)[important]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, layer.in_features, generator=generator)
    target = torch.randn(64, layer.out_features, generator=generator)
    for _ in range(UPDATES):
        begin_update(engine, method)
        others = 1e-4 * loss_of(model)
        engine.backward((layer(x) - target).square().mean() + others)
        finish_update(engine, method)
    ranks = {name: method.metrics()[f"adalora/rank/{name}"] for name in layers(model)}
    assert ranks[important] == R
    assert sum(rank < TARGET for rank in ranks.values()) > 0


def test_importance_is_smoothed_sensitivity_times_uncertainty(folder):
    """Equations 8 to 11 by hand, over three updates of one matrix."""
    model, method = attached(folder, "adalora", total_updates=UPDATES, **SETTINGS)
    name = "model.layers.0.self_attn.q_proj"
    parameter = layers(model)[name].lora_A["default"]
    sensitivity, uncertainty = torch.zeros_like(parameter), torch.zeros_like(parameter)
    engine = engine_of(model, total_updates=UPDATES)
    for _ in range(3):
        seen = {}

        def watch(update, seen=seen):
            seen["now"] = (parameter * parameter.grad).abs().detach()
            method.end_update(update)

        loss = loss_of(model)
        engine.backward(loss)
        engine.step(before_forgetting=lambda watch=watch: watch(0))
        sensitivity = 0.85 * sensitivity + 0.15 * seen["now"]
        uncertainty = 0.85 * uncertainty + 0.15 * (seen["now"] - sensitivity).abs()
    own = method.state_dict()
    torch.testing.assert_close(own["importance"][f"{name}.lora_A.default"], sensitivity)
    torch.testing.assert_close(own["uncertainty"][f"{name}.lora_A.default"], uncertainty)


def test_the_penalty_is_the_mean_distance_from_orthogonal_factors(folder):
    model, method = attached(folder, "adalora", orthogonality=0.5)
    with torch.no_grad():
        for layer in layers(model).values():
            # Rows of length s: A A^T - I has s^2 - 1 on its diagonal alone. Columns of B are orthonormal.
            layer.lora_A["default"].copy_(3 * torch.eye(4, layer.in_features))
            layer.lora_B["default"].copy_(torch.eye(layer.out_features, 4))
    assert method.penalty().item() == pytest.approx(0.5 * (8 * math.sqrt(4) + 0) / 2)
    assert attached(folder, "adalora", orthogonality=0.0)[1].penalty() is None


def test_the_penalty_is_pefts(folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, method = attached(folder, "adalora")
    move(model)
    adapters.save_adapter(model.model, tmp_path, base=str(folder))
    base = AutoModelForCausalLM.from_pretrained(folder)
    theirs = PeftModel.from_pretrained(base, tmp_path, is_trainable=True).eval()
    losses = []
    for weight in (0.5, 0.0):
        theirs.peft_config["default"].orth_reg_weight = weight
        losses.append(theirs.base_model(input_ids=IDS, labels=IDS).loss)
    torch.testing.assert_close(method.penalty(), losses[0] - losses[1])


def test_the_penalty_is_trained_once_per_update(folder):
    """Its gradient does not depend on how many micro-batches there are."""
    plain, _ = attached(folder, "adalora")
    loss_of(plain).backward()
    for parts in ([slice(0, 2)], [slice(0, 1), slice(1, 2)]):
        model, method = attached(folder, "adalora")
        trained = [p for p in model.parameters() if p.requires_grad]
        penalty = torch.autograd.grad(method.penalty(), trained, allow_unused=True)
        engine = TorchEngine(model.named_parameters(), lr=1e-2, total_updates=1, max_grad_norm=1e9)
        for rows in parts:
            engine.backward(loss_of(model, rows))
        finish_update(engine, method)
        # The optimiser's first moment is (1 - beta) times the gradient of its first step.
        seen = [engine.optimizer.state[p]["exp_avg"] / 0.1 for p in trained]
        wanted = [p.grad for p in plain.parameters() if p.requires_grad]
        for got, loss, more in zip(seen, wanted, penalty, strict=True):
            torch.testing.assert_close(got, loss if more is None else loss + more, rtol=1e-4, atol=1e-5)
        assert max(float(more.abs().max()) for more in penalty if more is not None) > 1e-3


def test_a_skipped_update_leaves_the_scores_alone(folder):
    model, method = attached(folder, "adalora", total_updates=UPDATES, **SETTINGS)
    engine = engine_of(model, total_updates=UPDATES)
    train(model, engine, method, 2)
    before = {name: t.clone() for name, t in method.state_dict()["importance"].items()}
    engine.backward(loss_of(model) * float("nan"))
    assert finish_update(engine, method)["skipped_count"] == 1
    after = method.state_dict()["importance"]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_resumed_run_has_all_scores(folder, tmp_path):
    methods = []
    for resumed in (False, True):
        model, method = attached(folder, "adalora", total_updates=UPDATES, **SETTINGS)
        engine = engine_of(model, total_updates=UPDATES)
        train(model, engine, method, 10)
        if resumed:
            torch.save(method.state_dict(), tmp_path / "state.pt")
            method = adapters.attach(
                models.load_causal_lm(str(folder)),
                type="adalora",
                r=R,
                budget=adapters.RankBudget(target_r=TARGET, warmup_share=0.1, final_share=0.3),
                total_updates=UPDATES,
                seed=7,
            )
            method.model = model.model
            method.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        train(model, engine, method, 5)
        methods.append(method)
    one, other = (method.allocator for method in methods)
    for ours, theirs in ((one.exp_avg_ipt, other.exp_avg_ipt), (one.exp_avg_unc, other.exp_avg_unc)):
        assert len(ours) == 3 * NUM_MATRICES
        assert all(bool((ours[name] > 0).any()) and torch.equal(ours[name], theirs[name]) for name in ours)
    assert methods[0].metrics() == methods[1].metrics()
    assert methods[0].metrics()["adalora/rank_total"] < NUM_MATRICES * R


def test_the_last_allocation_comes_even_when_its_update_was_skipped(folder):
    model, method = attached(folder, "adalora", total_updates=UPDATES, interval=10, **SETTINGS)
    engine = engine_of(model, total_updates=UPDATES)
    last = UPDATES - FINAL - 1
    for update in range(UPDATES):
        begin_update(engine, method)
        engine.backward(loss_of(model) * (float("nan") if update == last else 1.0))
        finish_update(engine, method)
    assert method.metrics()["adalora/rank_total"] == NUM_MATRICES * TARGET

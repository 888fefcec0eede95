"""Half fine-tuning: which half is frozen when, and that frozen means untouched, moments included."""

from __future__ import annotations

import pytest
import torch
from adapter_runs import attached, engine_of, named, train
from tiny import write_tiny_model

from alignment import adapters, models
from alignment.adapters.half import groups

ROUND = 3
LAYERS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("half") / "model", "qwen2", num_hidden_layers=LAYERS)


def half(folder, **changes):
    return attached(folder, "half", half_round=ROUND, **changes)


def frozen(model) -> set[str]:
    return {name for name, p in model.model.named_parameters() if not p.requires_grad}


def test_half_of_every_layers_matrices_is_frozen_and_the_other_half_next(folder):
    model, method = half(folder)
    assert not frozen(model)  # the optimiser is made for all of them
    rounds = []
    for update in range(4 * ROUND):
        method.begin_update(update)
        rounds.append(frozen(model))
    assert all(rounds[update] == rounds[update // ROUND * ROUND] for update in range(4 * ROUND))
    first, second, third, fourth = rounds[::ROUND]
    matrices = {f"{name}.weight" for group in groups(model.model) for name in group}
    biases = {name for name in first | second if name.endswith(".bias")}
    assert biases == {name for name, _ in model.model.named_parameters() if name.endswith("_proj.bias")}
    assert not first & second
    assert first | second == matrices | biases == third | fourth
    assert first != third  # drawn anew
    counts = [sum(f"{name}.weight" in first for name in group) for group in groups(model.model)]
    assert counts[::2] == [2] * LAYERS  # of four matrices of attention
    assert counts[1::2] == [1, 2, 1, 2]  # of three of the feed-forward, in turn
    assert not {name for name in first if "norm" in name or "embed" in name or "lm_head" in name}


def test_halves_follow_the_seed(folder):
    def chosen(seed):
        model, method = half(folder, seed=seed)
        method.begin_update(0)
        return frozen(model)

    assert chosen(1) == chosen(1) != chosen(2)


def test_what_is_frozen_stays_bit_for_bit_and_so_do_its_moments(folder):
    model, method = half(folder)
    engine = engine_of(model)
    parameters = dict(model.named_parameters())
    train(model, engine, method, ROUND)
    idle = {name for name, p in parameters.items() if not p.requires_grad}
    start = named(models.load_causal_lm(str(folder)))
    assert idle
    assert all(torch.equal(parameters[name], start[name]) == (name in idle) for name in parameters)
    assert idle == {name for name, p in parameters.items() if p not in engine.optimizer.state}

    after_one = named(model)
    moments = {
        name: {k: v.clone() for k, v in engine.optimizer.state[p].items()}
        for name, p in parameters.items()
        if p in engine.optimizer.state
    }
    train(model, engine, method, ROUND)
    resting = {name for name, p in parameters.items() if not p.requires_grad}
    assert not resting & idle
    for name in resting:
        assert torch.equal(parameters[name], after_one[name])
        assert all(torch.equal(v, engine.optimizer.state[parameters[name]][k]) for k, v in moments[name].items())
    assert not any(torch.equal(parameters[name], after_one[name]) for name in idle)


def test_the_share_that_is_trained_is_reported(folder):
    model, method = half(folder)
    method.begin_update(ROUND)
    metrics = method.metrics()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert metrics["half/round"] == 1
    assert metrics["half/trained_share"] == trained / sum(p.numel() for p in model.parameters())
    assert 0.3 < metrics["half/trained_share"] < 0.9


def test_without_a_length_the_run_has_two_rounds(folder):
    model, method = attached(folder, "half", total_updates=7)
    seen = []
    for update in range(7):
        method.begin_update(update)
        seen.append(method.metrics()["half/round"])
    assert seen == [0] * 4 + [1] * 3
    assert not adapters.has_adapter(model.model)
    assert adapters.mergeable("half")

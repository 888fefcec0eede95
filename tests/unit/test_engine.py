"""The optimiser step: small updates are not lost, bad gradients are not applied, and a resume changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from alignment.checkpoint import load_state, save_state
from alignment.engines.base import refuse_hook
from alignment.engines.torch import TorchEngine


def engine_of(weight, **settings):
    parameter = nn.Parameter(weight)
    defaults = {"lr": 1e-5, "total_updates": 1000, "max_grad_norm": 1e9}
    return parameter, TorchEngine([("w", parameter)], **{**defaults, **settings})


def train(parameter, engine, steps, seed=0):
    """Gradients of mixed size, the same whatever the dtype."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        direction = (1 + torch.rand(parameter.shape, generator=generator)).bfloat16()
        engine.backward((parameter * direction.to(parameter.dtype)).sum())
        engine.step()


def test_updates_far_below_the_ulp_of_bfloat16_add_up():
    """Near 1 a bfloat16 moves by at least 0.0039; 1,000 steps of about 1e-5 have to arrive all the same."""
    start = torch.linspace(0.5, 2.0, 32).reshape(4, 8).bfloat16()
    exact, reference = engine_of(start.float())
    rounded, engine = engine_of(start.clone())
    train(exact, reference, 1000)
    train(rounded, engine, 1000)
    assert (start.float() - exact.detach()).min() > 0.008
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded.detach(), exact.detach().bfloat16())


def test_gradients_of_micro_batches_are_summed_in_float32():
    parameter, engine = engine_of(torch.ones(1).bfloat16())
    for gradient in (1.0, 2**-10, 2**-10):
        engine.backward((parameter * gradient).sum())
    assert engine.step()["grad_norm"] == 1 + 2**-9


def test_masters_survive_a_resume_bit_for_bit(tmp_path):
    start = torch.linspace(0.5, 2.0, 8).bfloat16()
    whole, engine = engine_of(start.clone())
    train(whole, engine, 50)
    save_state(tmp_path / "engine.pt", engine.state_dict())
    resumed, other = engine_of(start.clone())
    other.load_state_dict(load_state(tmp_path / "engine.pt"))
    assert torch.equal(resumed, whole)
    train(whole, engine, 500, seed=1)
    train(resumed, other, 500, seed=1)
    assert not torch.equal(whole, start)
    assert torch.equal(resumed, whole)
    assert torch.equal(other.state_dict()["masters"]["w"], engine.state_dict()["masters"]["w"])


def test_a_state_of_another_dtype_is_refused():
    _, engine = engine_of(torch.ones(2))
    _, other = engine_of(torch.ones(2).bfloat16())
    with pytest.raises(ValueError, match="got float32 masters of 0 parameters, expected 1"):
        other.load_state_dict(engine.state_dict())


def test_float16_is_not_trained():
    with pytest.raises(ValueError, match="got float16 for the trained w, expected float32 or bfloat16"):
        engine_of(torch.ones(2).half())
    frozen = nn.Parameter(torch.ones(2).half(), requires_grad=False)
    TorchEngine([("frozen", frozen), ("w", nn.Parameter(torch.ones(2)))], lr=1e-3, total_updates=1)


def test_the_fused_step_is_adamw():
    """One step by hand (Loshchilov 2019): decay, then the bias-corrected moments, which are g and g^2."""
    start, gradient = torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([[0.3, -0.1, 1e-9]])
    parameter, engine = engine_of(start.clone(), lr=0.1, eps=1e-8, weight_decay=0.2)
    assert engine.optimizer.defaults["fused"]
    engine.backward((parameter * gradient).sum())
    engine.step()
    expected = start * (1 - 0.1 * 0.2) - 0.1 * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(parameter.detach(), expected)


def spoil(parameter, engine, value=math.inf):
    engine.backward((parameter * value).sum())
    return engine.step()


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_skipped_updates_in_a_row_end_the_run(value):
    parameter, engine = engine_of(torch.ones(2))
    assert spoil(parameter, engine, value)["skipped_count"] == 1
    assert spoil(parameter, engine, value)["skipped_count"] == 1
    with pytest.raises(RuntimeError, match=r"skipped 3 updates in a row.*optimizer\.lr.*model\.dtype.*reward"):
        spoil(parameter, engine, value)
    assert torch.equal(parameter.detach(), torch.ones(2))


def test_a_finite_update_starts_the_count_again():
    parameter, engine = engine_of(torch.ones(2), max_skipped_in_a_row=2)
    for _ in range(3):
        spoil(parameter, engine)
        engine.backward(parameter.sum())
        assert engine.step()["skipped_count"] == 0
    assert engine.num_skipped == 3


def test_a_resume_goes_on_counting():
    parameter, engine = engine_of(torch.ones(2))
    spoil(parameter, engine)
    spoil(parameter, engine)
    other_parameter, other = engine_of(torch.ones(2))
    other.load_state_dict(engine.state_dict())
    with pytest.raises(RuntimeError, match="skipped 3 updates in a row"):
        spoil(other_parameter, other)


def test_a_hook_sees_the_clipped_gradients_and_is_refused_where_no_process_has_them():
    parameter = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    engine = TorchEngine([("p", parameter)], lr=0.1, total_updates=2, max_grad_norm=1.0)
    start, seen = parameter.detach().clone(), []
    engine.backward((10 * parameter).sum())
    engine.step(before_forgetting=lambda: seen.extend([parameter.grad.clone(), parameter.detach().clone()]))
    gradient, after = seen
    torch.testing.assert_close(gradient, torch.full((2,), 0.5**0.5))
    assert not torch.equal(after, start)  # the step was made before
    assert parameter.grad is None
    with pytest.raises(ValueError, match=r"engine: got deepspeed with a method that reads gradients .* zero_stage 0"):
        refuse_hook(lambda: None, "deepspeed")
    refuse_hook(None, "deepspeed")

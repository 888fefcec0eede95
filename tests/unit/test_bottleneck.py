"""Bottleneck adapters: their size, their start, and where they stand."""

from __future__ import annotations

import pytest
import torch
from adapter_runs import IDS, attached, hidden, moved
from tiny import write_tiny_model

from alignment import adapters, models
from alignment.adapters.bottleneck import blocks

R, WIDTH, LAYERS = 4, 32, 2


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request, tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("bottleneck") / request.param, request.param)


def test_two_per_layer_of_the_papers_size(folder):
    model, _ = attached(folder, "bottleneck")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == LAYERS * 2 * (2 * WIDTH * R + R + WIDTH)
    assert sum(name.endswith("bottleneck.down.weight") for name in trained) == 2 * LAYERS
    upper, _ = attached(folder, "bottleneck", last_layers=1)
    assert all(".1." in name for name, p in upper.named_parameters() if p.requires_grad)


def test_the_start_is_near_the_identity(folder):
    base = hidden(models.load_causal_lm(str(folder)))
    difference = (hidden(attached(folder, "bottleneck")[0]) - base).norm() / base.norm()
    assert 0 < difference < 1e-3


def test_they_stand_before_the_residual_sums(folder):
    """h + up(gelu(down(h))) of what attention and feed-forward return, before it is added to the stream."""
    model = moved(folder, "bottleneck")
    base = models.load_causal_lm(str(folder))
    for own, plain in zip(blocks(model.model), blocks(base.model), strict=True):
        seen = {}
        own.register_forward_hook(lambda _, args, kwargs, out, seen=seen: seen.update(out=out), with_kwargs=True)
        own.register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.update(args=args, kwargs=kwargs), with_kwargs=True
        )
        hidden(model)
        with torch.no_grad():
            h = plain(*seen["args"], **seen["kwargs"])
            h = h[0] if isinstance(h, tuple) else h
            own_out = seen["out"][0] if isinstance(seen["out"], tuple) else seen["out"]
            down, up = own.bottleneck.down, own.bottleneck.up
            small = torch.nn.functional.gelu(h @ down.weight.T + down.bias)
            torch.testing.assert_close(own_out, h + small @ up.weight.T + up.bias, rtol=1e-5, atol=1e-5)


def test_base_weights_keep_their_names(folder):
    base = {name for name, _ in models.load_causal_lm(str(folder)).named_parameters()}
    model, _ = attached(folder, "bottleneck")
    assert {name for name, _ in model.named_parameters() if "bottleneck" not in name} == base


def test_checkpointed_gradients_are_the_same(folder):
    found = []
    for checkpointing in (False, True):
        model = moved(folder, "bottleneck")
        if checkpointing:
            models.enable_gradient_checkpointing(model)
        model.hidden(IDS, torch.ones_like(IDS)).square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-4, atol=1e-4)


def test_layers_of_another_build_are_refused(folder):
    model = models.load_causal_lm(str(folder))
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    layers[1].third = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"adapter.type: got bottleneck .* layer 1 has the parts .*'third'"):
        adapters.attach(model, type="bottleneck", r=R, seed=0, total_updates=1)

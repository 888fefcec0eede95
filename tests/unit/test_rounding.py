"""Factors over four bits that start at what rounding took: the optimum, from any grouping, on every rank."""

from __future__ import annotations

import math

import pytest
import torch
from adapter_runs import write_model

from actors.loading import original_weights
from alignment import adapters
from alignment.adapters.layers import tuner_layers
from alignment.forward import run_singly
from alignment.models import HfModel, load_causal_lm
from alignment.quantization import dequantized

pytest.importorskip("bitsandbytes")

SEEN = [[*range(3, 40)], [*range(90, 40, -1)], [7, 200, 31, 31, 9]]
UNSEEN = torch.arange(120, 160).unsqueeze(0)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def path(request, tmp_path_factory) -> str:
    return str(write_model(tmp_path_factory.mktemp("rounding") / request.param, request.param))


def started(path: str, r: int, *, variant: str = "lora", **options) -> HfModel:
    model = load_causal_lm(path, quantization="nf4")
    adapters.attach_lora(model.model, r=r, alpha=3.0, seed=1, variant=variant)
    adapters.absorb_rounding(model.model, lambda: run_singly(model, SEEN), original_weights(path, None), **options)
    return model


def logits(model: HfModel) -> torch.Tensor:
    with torch.no_grad():
        return model.head(model.hidden(UNSEEN, torch.ones_like(UNSEEN)))


def inputs_of(model: HfModel) -> dict[str, torch.Tensor]:
    """What each adapted matrix is fed by the sequences, (tokens, inputs), with the adapter at zero."""
    found: dict[str, list[torch.Tensor]] = {}

    def watch(name, layer):
        def keep(_, arguments, __):
            found.setdefault(name, []).append(arguments[0][0])

        return layer.get_base_layer().register_forward_hook(keep)

    hooks = [watch(name, layer) for name, layer in tuner_layers(model.model)]
    run_singly(model, SEEN)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows) for name, rows in found.items()}


def errors_of(model: HfModel, path: str) -> dict[str, torch.Tensor]:
    """W - W4 of each adapted matrix, (out, in)."""
    plain = load_causal_lm(path).model
    errors = {}
    for name, layer in tuner_layers(model.model):
        weight = plain.get_submodule(name).weight.detach()
        stored = weight.T if type(plain.get_submodule(name)).__name__ == "Conv1D" else weight
        errors[name] = stored - dequantized(layer.get_base_layer().weight)
    return errors


def test_full_rank_gives_the_model_of_before_back(path):
    plain, rounded = load_causal_lm(path), load_causal_lm(path, quantization="nf4")
    assert (logits(plain) - logits(rounded)).abs().max() > 0.1
    torch.testing.assert_close(logits(started(path, 256)), logits(plain), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("variant", ["lora", "rslora"])
def test_the_outputs_that_are_left_lost_are_the_least_of_that_rank(path, variant):
    r = 4
    untouched = load_causal_lm(path, quantization="nf4")
    adapters.attach_lora(untouched.model, r=r, alpha=3.0, seed=1)
    inputs, errors = inputs_of(untouched), errors_of(untouched, path)
    for name, layer in tuner_layers(started(path, r, variant=variant).model):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert layer.scaling["default"] == pytest.approx(3.0 / (r if variant == "lora" else math.sqrt(r)))
        lost = inputs[name] @ errors[name].T
        left = lost - inputs[name] @ (layer.scaling["default"] * b @ a).detach().T
        # Eckart-Young: what r directions cannot give back of a matrix is the tail of its singular values.
        tail = torch.linalg.svdvals(lost.double())[r:].square().sum()
        assert left.square().sum().item() == pytest.approx(tail.item(), rel=1e-3), name
        assert tail < 0.9 * lost.square().sum()
        torch.testing.assert_close(a.norm(dim=1), torch.full((r,), 1 / math.sqrt(3)), rtol=1e-4, atol=0)


def test_passes_and_their_number_change_nothing(path):
    whole, singly = (started(path, 4, most_bytes=size) for size in (2**30, 1))
    for (name, one), (_, other) in zip(tuner_layers(whole.model), tuner_layers(singly.model), strict=True):
        products = [x.lora_B["default"].weight @ x.lora_A["default"].weight for x in (one, other)]
        torch.testing.assert_close(*products, rtol=1e-4, atol=1e-6, msg=name)


def test_where_nothing_is_lost_the_adapter_starts_as_usual(tmp_path):
    path = write_model(tmp_path / "model")
    model = load_causal_lm(str(path))
    with torch.no_grad():
        model.model.get_submodule("model.layers.1.mlp.down_proj").weight.zero_()
    model.model.save_pretrained(path)
    usual = load_causal_lm(str(path), quantization="nf4")
    adapters.attach_lora(usual.model, r=4, alpha=3.0, seed=1)
    (one, other) = (
        dict(tuner_layers(m.model))["model.layers.1.mlp.down_proj"] for m in (started(str(path), 4), usual)
    )
    assert torch.equal(one.lora_A["default"].weight, other.lora_A["default"].weight)
    assert one.lora_B["default"].weight.abs().max() == 0


def test_a_weight_of_another_shape_is_refused(tmp_path):
    path, other = write_model(tmp_path / "one", hidden_size=64), write_model(tmp_path / "other")
    model = load_causal_lm(str(path), quantization="nf4")
    adapters.attach_lora(model.model, r=2, alpha=3.0, seed=1)
    with pytest.raises(ValueError, match=r"training\.calibration_examples: got .* of shape .* expected \["):
        adapters.absorb_rounding(model.model, lambda: None, original_weights(str(other), None))

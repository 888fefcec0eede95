"""What a model with an adapter computes with, as plain weights under the base model's own names."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignment.adapters.layers import UNMERGEABLE_MARKS, is_adapter_name, tuner_layers
from alignment.config.model import MERGEABLE_TYPES
from alignment.quantization import dequantized, dequantized_bytes, is_quantized
from alignment.sharding import gathered, gathered_state_dict, is_split, num_elements


def mergeable(type: str) -> bool:
    """Whether what a method has trained can become weights of the base model's own shapes."""
    return type in MERGEABLE_TYPES


@torch.no_grad()
def merged_weights(
    model: nn.Module, names: Collection[str] | None = None, *, whole: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of all that differs from the base, under the base model's own names.

    Full fine-tuning yields every parameter once (a tied head is its embedding); an adapter yields what its layers
    compute with, as W + scale * B A of LoRA, and with `whole` the parameters without an adapter as well. A four-bit W
    is yielded in the dtype it computes in, adapter or not: rounding has moved it away from the base. `names` picks
    some; the others are not computed.

    Raises:
        ValueError: the adapter cannot be merged.
    """
    refuse_unmergeable(model)
    layers = _adapted(model)
    for name, parameter in model.named_parameters():
        plain = name.replace(".base_layer.", ".")
        if is_adapter_name(name) or (names is not None and plain not in names):
            continue
        if plain in layers:
            yield plain, _merged(layers[plain], _full(parameter))
        elif whole or not layers or is_quantized(parameter):
            yield plain, _full(parameter)


def refuse_unmergeable(model: nn.Module) -> None:
    """Raises ValueError for what stands between the base model's weights or in front of its input."""
    kinds = [mark for mark in UNMERGEABLE_MARKS if any(mark in name for name, _ in model.named_parameters())]
    if kinds:
        raise ValueError(
            f"adapter.type: got {kinds[0].replace('_', ' ')} to be merged into weights, expected one of "
            f"{', '.join(MERGEABLE_TYPES)}; write the adapter alone (export_adapter), or train one of those"
        )


def _adapted(model: nn.Module) -> dict[str, Any]:
    """Plain names of the parameters that merging changes, and the layer that does."""
    layers = {}
    for name, layer in tuner_layers(model):
        layers[f"{name}.weight"] = layer
        if _scales_outputs(layer) and layer.get_base_layer().bias is not None:
            layers[f"{name}.bias"] = layer
    return layers


def _scales_outputs(layer: Any) -> bool:
    return hasattr(layer, "ia3_l") and not layer.is_feedforward


def _full(parameter: Tensor) -> Tensor:
    return dequantized(parameter) if is_quantized(parameter) else gathered(parameter)


def _merged(layer: Any, value: Tensor) -> Tensor:
    """A weight, or a bias, with the layer's adapter in it."""
    if hasattr(layer, "ia3_l"):
        return _scaled(layer, value)
    if hasattr(layer, "lora_E"):
        return value + _singular_delta(layer).to(value.dtype)
    if "default" in layer.lora_magnitude_vector:
        return _directed(layer, value)
    return value + _delta(layer)


def _scaled(layer: Any, value: Tensor) -> Tensor:
    """(IA)^3: rows of an (outputs, inputs) matrix times the outputs' vector, or columns times the inputs'."""
    vector = gathered(layer.ia3_l["default"]).flatten()
    if value.ndim == 2 and layer.is_feedforward == getattr(layer, "fan_in_fan_out", False):
        vector = vector.unsqueeze(1)
    return (value * vector).to(value.dtype)


def _singular_delta(layer: Any) -> Tensor:
    """AdaLoRA's scale * B diag(E) A in the layout of the layer's weight."""
    a, b, e = (gathered(factor["default"]) for factor in (layer.lora_A, layer.lora_B, layer.lora_E))
    delta = (b @ (a * e)) * layer.scaling["default"] / (gathered(layer.ranknum["default"]) + 1e-5)
    return delta.T if getattr(layer, "fan_in_fan_out", False) else delta


def _directed(layer: Any, value: Tensor) -> Tensor:
    """DoRA: rows of V = W + scale * B A, of the length that was trained."""
    magnitude = gathered(layer.lora_magnitude_vector["default"].weight).float()
    moved = value.float() + _delta(layer).float()
    if layer.fan_in_fan_out:
        return (moved * (magnitude / moved.norm(dim=0))).to(value.dtype)
    return (moved * (magnitude / moved.norm(dim=1)).unsqueeze(1)).to(value.dtype)


def _delta(layer: Any) -> Tensor:
    """scale * B A in the layout of the layer's weight; in float32 on a CPU, which is slow at narrower products."""
    a, b = (gathered(factor["default"].weight) for factor in (layer.lora_A, layer.lora_B))
    if b.device.type == "cpu":
        a, b = a.float(), b.float()
    delta = (b @ a) * layer.scaling["default"]
    return (delta.T if layer.fan_in_fan_out else delta).to(layer.lora_B["default"].weight.dtype)


def is_split_model(model: nn.Module) -> bool:
    """Whether several ranks hold parts of its parameters."""
    return any(is_split(parameter) for parameter in model.parameters())


def merged_sizes(model: nn.Module, *, whole: bool = False) -> dict[str, int]:
    """Bytes of each weight that `merged_weights` yields, in its order, without computing any."""
    refuse_unmergeable(model)
    layers = _adapted(model)
    sizes = {}
    for name, parameter in model.named_parameters():
        plain = name.replace(".base_layer.", ".")
        sent = whole or not layers or plain in layers or is_quantized(parameter)
        if not is_adapter_name(name) and sent:
            sizes[plain] = dequantized_bytes(parameter) or num_elements(parameter) * parameter.itemsize
    return sizes


@torch.no_grad()
def merged_state_dict(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """The whole model's state dict with adapters merged, under the base model's names; `keep` as for `collect`."""
    if any(is_quantized(p) for p in model.parameters()):
        # Its state dict has the quantisation constants as well, which mean nothing beside full weights.
        return dict(merged_weights(model, whole=True))
    on_host = is_split_model(model)
    merged = {}
    for name, tensor in merged_weights(model, _adapted(model)):
        if keep:
            merged[name] = tensor.cpu() if on_host else tensor
    state = {}
    for name, tensor in gathered_state_dict(model, keep=keep).items():
        if is_adapter_name(name):
            continue
        plain = name.replace(".base_layer.", ".")
        state[plain] = merged.get(plain, tensor).detach()
    return state


def export_merged(model: Any, folder: Path, tokenizer: Any | None = None, *, write: bool = True) -> None:
    """Write a Hugging Face folder with adapters merged into the weights; the trained model is left as it is.

    A four-bit base is merged in the dtype it computes in and not rounded again. `write`: as for `save_adapter`.

    Raises:
        ValueError: the adapter cannot be merged.
    """
    state = merged_state_dict(model, keep=write)
    if not write:
        return
    plain_shell(model).save_pretrained(folder, state_dict=state)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def plain_shell(model: Any) -> Any:
    """A model of the same architecture that saves full weights: `model` itself, or one without memory beside it."""
    if not any(is_quantized(p) for p in model.parameters()):
        return model
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        return type(model)(config)

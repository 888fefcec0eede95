"""Which layers of a model carry an adapter, by which names, and how they are switched off."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from alignment.sharding import decoder_layers

MARKS = ("lora_", "ia3_l", "ranknum", "bottleneck", "virtual_tokens")
"""What the name of every parameter of an adapter has in it."""
UNMERGEABLE_MARKS = ("bottleneck", "virtual_tokens")
START = "start"
"""Peft's name for the factors that pissa began with, which stay as they are."""


def linear_layers(model: nn.Module, last_layers: int | None = None) -> dict[str, nn.Module]:
    """Linear layers by full name, of the top `last_layers` decoder layers."""
    from transformers.pytorch_utils import Conv1D

    prefix, layers = decoder_layers(model)
    first = 0 if last_layers is None else max(0, len(layers) - last_layers)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and name.startswith(prefix + ".")
        and int(name[len(prefix) + 1 :].split(".")[0]) >= first
    }


def target_names(model: nn.Module, target_modules: tuple[str, ...] | str, last_layers: int | None) -> list[str]:
    """Full names of the matrices that get an adapter, from the top `last_layers` decoder layers.

    Raises:
        ValueError: one of `target_modules` names no linear layer there.
    """
    linear = {name: name.rsplit(".", 1)[-1] for name in linear_layers(model, last_layers)}
    if target_modules == "all-linear":
        return list(linear)
    known = sorted(set(linear.values()))
    if not target_modules or not set(target_modules) <= set(known):
        raise ValueError(
            f"adapter.target_modules: got {target_modules}, expected names of linear layers of this model, which are "
            f'{known}; name some of them, or "all-linear"'
        )
    return [name for name, last in linear.items() if last in target_modules]


def stored_transposed(model: nn.Module, names: list[str]) -> bool:
    """Whether these layers keep their matrix as (inputs, outputs), as GPT-2's do."""
    return any(is_transposed(type(model.get_submodule(name))) for name in names)


def is_transposed(kind: type) -> bool:
    from transformers.pytorch_utils import Conv1D

    return issubclass(kind, Conv1D)


def train_adapter_only(model: nn.Module) -> None:
    """Leave what an adapter adds trainable, and a scalar head; freeze everything else."""
    for name, parameter in model.named_parameters():
        own = is_adapter_name(name) and "ranknum" not in name and f".{START}." not in name
        parameter.requires_grad_(own or name == "score.weight")


def is_adapter_name(name: str) -> bool:
    """Whether a parameter of this name is an adapter's, not the base model's."""
    return any(mark in name for mark in MARKS)


def has_adapter(model: nn.Module) -> bool:
    return any(is_adapter_name(name) for name, _ in model.named_parameters())


@contextlib.contextmanager
def seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Draws of the block depend on the seed alone, and those after it do not depend on the block."""
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def tuner_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers that peft has put around linear ones, by the linear layer's name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


@contextlib.contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """The base model, for the time of the block: with LoRA this is the reference, at no cost in memory.

    Of pissa, whose base lacks what its adapter began with, that beginning stays on: the base up to rounding.
    """
    layers = [layer for _, layer in tuner_layers(model)]
    switches = [module for module in model.modules() if hasattr(module, "adapter_enabled")]
    began = [layer for layer in layers if START in getattr(layer, "lora_A", {})]
    # Not by peft's own switch, which also moves requires_grad: of a parameter that is split there are two.
    _switch(layers, switches, began, on=False)
    try:
        yield
    finally:
        _switch(layers, switches, began, on=True)


def _switch(layers: list[Any], switches: list[Any], began: list[Any], *, on: bool) -> None:
    for layer in layers:
        layer._disable_adapters = not on
    for module in switches:
        module.adapter_enabled = on
    for layer in began:
        layer._disable_adapters = False
        layer._active_adapter = "default" if on else START

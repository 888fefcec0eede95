"""Adapters on disk, in peft's own format wherever peft has the method."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignment.adapters.bottleneck import load_bottlenecks, save_bottlenecks
from alignment.adapters.layers import START, tuner_layers
from alignment.adapters.virtual_tokens import load_virtual_tokens, save_virtual_tokens
from alignment.sharding import assign, collect, gathered

ADAPTER_FILE = "adapter_model.safetensors"


def save_adapter(model: Any, folder: Path, *, base: str, write: bool = True) -> None:
    """Write the adapter (and a scalar head) in peft's format: `PeftModel.from_pretrained` loads the folder.

    Pissa is written as the LoRA of twice its rank that does the same to the original weights: [A; A0] and [B, -B0],
    with what it began with (Meng 2024, appendix C).

    `write`: False for a rank that only takes part in gathering what is split.
    """
    if hasattr(model, "bottleneck_r"):
        return save_bottlenecks(model, folder, base=base, write=write)
    if hasattr(model, "virtual_tokens"):
        return save_virtual_tokens(model, folder, base=base, write=write)
    tensors = collect(_named(model), keep=write)
    if not write:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.inference_mode = base, True
    # Sets, whose order would differ from process to process.
    config.target_modules = sorted(config.target_modules)
    if hasattr(config, "feedforward_modules"):
        config.feedforward_modules = sorted(config.feedforward_modules)
    _as_lora(config, tensors).save_pretrained(str(folder))
    config.inference_mode = False
    for name, layer in _scaling_layers(model):
        shape = (1, -1) if layer.is_feedforward else (-1, 1)
        tensors[name] = tensors[name].view(shape)
    tensors = {_peft_name(name): tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, str(folder / ADAPTER_FILE), metadata={"format": "pt"})
    return None


@torch.no_grad()
def load_adapter(model: nn.Module, folder: Path) -> None:
    """Copy a saved adapter back, bit for bit. A missing or unknown name is an error."""
    if hasattr(model, "bottleneck_r"):
        return load_bottlenecks(model, folder)
    if hasattr(model, "virtual_tokens"):
        return load_virtual_tokens(model, folder)
    saved = load_file(str(folder / ADAPTER_FILE))
    own = {_peft_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    if own.keys() != saved.keys():
        raise ValueError(
            f"{folder}: got {len(saved)} adapter tensors, expected {len(own)}; first differences "
            f"{sorted(own.keys() ^ saved.keys())[:3]}; resume with the adapter settings of the saved run"
        )
    for name, _ in _scaling_layers(model):
        saved[_peft_name(name)] = saved[_peft_name(name)].flatten()
    starts = _split_starts(model, saved)
    for name, parameter in own.items():
        assign(parameter, saved[name])
    for layer, a, b in starts:
        _restart(layer, a, b)
    return None


def export_adapter(model: Any, folder: Path, *, base: str, tokenizer: Any | None = None, write: bool = True) -> None:
    """The adapter folder as a user loads it, with its tokenizer. Arguments as for `save_adapter`."""
    save_adapter(model, folder, base=base, write=write)
    if write and tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _peft_name(name: str) -> str:
    plain = name.replace(".default.", ".").removesuffix(".default")
    return "base_model.model." + plain.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def _named(model: nn.Module) -> list[tuple[str, Tensor]]:
    """What is trained, and what pissa's factors began with."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad or f".{START}." in name]


def _scaling_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Vectors of (IA)^3 by name, and their layers; peft's file has them as matrices of one row or column."""
    return [(f"{name}.ia3_l.default", layer) for name, layer in tuner_layers(model) if hasattr(layer, "ia3_l")]


def _as_lora(config: Any, tensors: dict[str, Tensor]) -> Any:
    """The config that fits the original weights; of pissa, `tensors` are put together in place."""
    starts = [name for name in tensors if f".{START}." in name]
    for name in starts:
        trained, start = name.replace(f".{START}.", ".default."), tensors.pop(name)
        if "lora_A" in name:
            tensors[trained] = torch.cat([tensors[trained], start.to(tensors[trained])])
        else:
            tensors[trained] = torch.cat([tensors[trained], -start.to(tensors[trained])], dim=1)
    if not starts:
        return config
    plain = copy.copy(config)
    plain.r, plain.lora_alpha, plain.init_lora_weights = 2 * config.r, 2 * config.lora_alpha, True
    return plain


def _split_starts(model: nn.Module, saved: dict[str, Tensor]) -> list[tuple[Any, Tensor, Tensor]]:
    """Take what pissa began with out of `saved` again: (layer, A0, B0)."""
    starts = []
    for name, layer in tuner_layers(model):
        if START not in getattr(layer, "lora_A", {}):
            continue
        a, b = (_peft_name(f"{name}.{factor}.default.weight") for factor in ("lora_A", "lora_B"))
        r = layer.r["default"]
        starts.append((layer, saved[a][r:], -saved[b][:, r:]))
        saved[a], saved[b] = saved[a][:r].contiguous(), saved[b][:, :r].contiguous()
    return starts


def _restart(layer: Any, a: Tensor, b: Tensor) -> None:
    """Begin where the saved run did. The decomposition of another machine differs in its last bits."""
    own_a, own_b = (gathered(factors[START].weight) for factors in (layer.lora_A, layer.lora_B))
    a, b = a.to(own_a), b.to(own_b)
    if torch.equal(own_a, a) and torch.equal(own_b, b):
        return
    weight = layer.get_base_layer().weight
    moved = layer.scaling["default"] * (own_b.float() @ own_a.float() - b.float() @ a.float())
    assign(weight, gathered(weight) + (moved.T if layer.fan_in_fan_out else moved).to(weight.dtype))
    assign(layer.lora_A[START].weight, a)
    assign(layer.lora_B[START].weight, b)

"""Attach, disable, merge and store LoRA adapters (Hu 2021) on a transformers model. The only importer of peft."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignment.quantization import dequantized, dequantized_bytes, is_quantized
from alignment.sharding import assign, collect, decoder_layers, gathered, gathered_state_dict, is_split, num_elements


def attach_lora(
    model: nn.Module,
    *,
    r: int,
    alpha: float,
    target_modules: tuple[str, ...] | str = "all-linear",
    last_layers: int | None = None,
    seed: int = 0,
) -> None:
    """Put LoRA layers into `model` in place; only they (and a scalar head) stay trainable.

    B starts at zero, so the adapted model equals the base until the first update.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    names = target_names(model, target_modules, last_layers)
    conv = any(isinstance(model.get_submodule(name), Conv1D) for name in names)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # any float
        lora_dropout=0.0,
        target_modules=names,
        fan_in_fan_out=conv,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name == "score.weight")


def target_names(model: nn.Module, target_modules: tuple[str, ...] | str, last_layers: int | None) -> list[str]:
    """Full names of the matrices that get an adapter, from the top `last_layers` decoder layers.

    Raises:
        ValueError: one of `target_modules` names no linear layer there.
    """
    from transformers.pytorch_utils import Conv1D

    prefix, layers = decoder_layers(model)
    first = 0 if last_layers is None else max(0, len(layers) - last_layers)
    linear = {
        name: name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and name.startswith(prefix + ".")
        and int(name[len(prefix) + 1 :].split(".")[0]) >= first
    }
    if target_modules == "all-linear":
        return list(linear)
    known = sorted(set(linear.values()))
    if not target_modules or not set(target_modules) <= set(known):
        raise ValueError(
            f"adapter.target_modules: got {target_modules}, expected names of linear layers of this model, which are "
            f'{known}; name some of them, or "all-linear"'
        )
    return [name for name, last in linear.items() if last in target_modules]


def has_adapter(model: nn.Module) -> bool:
    return any("lora_" in name for name, _ in model.named_parameters())


@contextlib.contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """The base model, for the time of the block: with LoRA this is the reference, at no cost in memory."""
    layers = [layer for _, layer in _lora_layers(model)]
    # Not by peft's own switch, which also moves requires_grad: of a parameter that is split there are two.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _peft_name(name: str) -> str:
    return "base_model.model." + name.replace(".default.", ".")


def save_adapter(model: Any, folder: Path, *, base: str, write: bool = True) -> None:
    """Write the adapter (and a scalar head) in peft's format: `PeftModel.from_pretrained` loads the folder.

    `write`: False for a rank that only takes part in gathering what is split.
    """
    tensors = collect(((name, p) for name, p in model.named_parameters() if p.requires_grad), keep=write)
    if not write:
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.inference_mode = base, True
    # A set, whose order would differ from process to process.
    config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(folder))
    config.inference_mode = False
    tensors = {_peft_name(name): tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})


@torch.no_grad()
def load_adapter(model: nn.Module, folder: Path) -> None:
    """Copy a saved adapter back, bit for bit. A missing or unknown name is an error."""
    saved = load_file(str(folder / "adapter_model.safetensors"))
    own = {_peft_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    if own.keys() != saved.keys():
        raise ValueError(
            f"{folder}: got {len(saved)} adapter tensors, expected {len(own)}; first differences "
            f"{sorted(own.keys() ^ saved.keys())[:3]}; resume with the adapter settings of the saved run"
        )
    for name, parameter in own.items():
        assign(parameter, saved[name])


@torch.no_grad()
def merged_weights(
    model: nn.Module, names: Collection[str] | None = None, *, whole: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of all that differs from the base, under the base model's own names.

    Full fine-tuning yields every parameter once (a tied head is its embedding); LoRA yields W + scale * B A, and with
    `whole` the parameters without an adapter as well. A four-bit W is yielded in the dtype it computes in, adapter or
    not: rounding has moved it away from the base. `names` picks some; the others are not computed.
    """
    layers = {f"{name}.weight": layer for name, layer in _lora_layers(model)}
    for name, parameter in model.named_parameters():
        plain = name.replace(".base_layer.", ".")
        if "lora_" in name or (names is not None and plain not in names):
            continue
        if plain in layers:
            yield plain, _full(parameter) + _delta(layers[plain])
        elif whole or not layers or is_quantized(parameter):
            yield plain, _full(parameter)


def _full(parameter: Tensor) -> Tensor:
    return dequantized(parameter) if is_quantized(parameter) else gathered(parameter)


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
    layers = {f"{name}.weight" for name, _ in _lora_layers(model)}
    sizes = {}
    for name, parameter in model.named_parameters():
        plain = name.replace(".base_layer.", ".")
        sent = whole or not layers or plain in layers or is_quantized(parameter)
        if "lora_" not in name and sent:
            sizes[plain] = dequantized_bytes(parameter) or num_elements(parameter) * parameter.itemsize
    return sizes


@torch.no_grad()
def merged_state_dict(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """The whole model's state dict with adapters merged, under the base model's names; `keep` as for `collect`."""
    if any(is_quantized(p) for p in model.parameters()):
        # Its state dict has the quantisation constants as well, which mean nothing beside full weights.
        return dict(merged_weights(model, whole=True))
    on_host = is_split_model(model)
    adapted = {f"{name}.weight" for name, _ in _lora_layers(model)}
    merged = {}
    for name, tensor in merged_weights(model, adapted):
        if keep:
            merged[name] = tensor.cpu() if on_host else tensor
    state = {}
    for name, tensor in gathered_state_dict(model, keep=keep).items():
        if "lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        state[plain] = merged.get(plain, tensor).detach()
    return state


def export_merged(model: Any, folder: Path, tokenizer: Any | None = None, *, write: bool = True) -> None:
    """Write a Hugging Face folder with adapters merged into the weights; the trained model is left as it is.

    A four-bit base is merged in the dtype it computes in and not rounded again. `write`: as for `save_adapter`.
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

"""Bottleneck adapters (Houlsby 2019, arXiv 1902.00751): two small layers with a skip around them, behind the
attention and behind the feed-forward of every decoder layer, before their residual sums."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignment.adapters.layers import linear_layers, seeded, train_adapter_only
from alignment.sharding import assign, collect, decoder_layers

INIT_STD = 1e-2
"""Small enough that an adapter starts near the identity (section 3.6)."""
CONFIG_FILE, WEIGHTS_FILE = "bottleneck.json", "bottleneck.safetensors"


class Bottleneck(nn.Module):
    """h + up(gelu(down(h))), of width r: 2 d r + r + d parameters."""

    def __init__(self, width: int, r: int, *, like: Tensor) -> None:
        super().__init__()
        self.down = nn.Linear(width, r, device=like.device, dtype=like.dtype)
        self.up = nn.Linear(r, width, device=like.device, dtype=like.dtype)
        self.adapter_enabled = True
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD)
            nn.init.zeros_(layer.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        if not self.adapter_enabled:
            return hidden
        result: Tensor = hidden + self.up(nn.functional.gelu(self.down(hidden)))
        return result


def attach_bottlenecks(model: Any, *, r: int, last_layers: int | None, seed: int) -> None:
    """Put two adapters into each of the top `last_layers` layers, in place; only they (and a scalar head) train.

    Raises:
        ValueError: a decoder layer does not have one attention and one feed-forward part.
    """
    like = next(p for p in model.parameters() if p.is_floating_point())
    width = model.config.get_text_config().hidden_size
    with seeded(model, seed):
        for block in blocks(model, last_layers):
            block.bottleneck = Bottleneck(width, r, like=like)
            block.register_forward_hook(_through_bottleneck)
    model.bottleneck_r = r
    train_adapter_only(model)


def blocks(model: nn.Module, last_layers: int | None = None) -> list[nn.Module]:
    """Attention and feed-forward of each decoder layer, in order."""
    prefix, layers = decoder_layers(model)
    linear = linear_layers(model, last_layers)
    found: dict[str, list[str]] = {}
    for name in linear:
        number, part = name[len(prefix) + 1 :].split(".")[:2]
        parts = found.setdefault(number, [])
        if part not in parts:
            parts.append(part)
    for number, parts in found.items():
        if len(parts) != 2:
            raise ValueError(
                f"adapter.type: got bottleneck with a model whose layer {number} has the parts {parts}, expected an "
                "attention and a feed-forward; choose another type, as lora"
            )
    return [layers[int(number)].get_submodule(part) for number, parts in found.items() for part in parts]


def _through_bottleneck(block: nn.Module, _: Any, output: Any) -> Any:
    """A hook, so that the base model's weights keep their names."""
    bottleneck: Any = block.bottleneck
    if isinstance(output, tuple):  # an attention returns its weights as well
        return (bottleneck(output[0]), *output[1:])
    return bottleneck(output)


def save_bottlenecks(model: Any, folder: Path, *, base: str, write: bool = True) -> None:
    """`bottleneck.safetensors`, by the model's own names, and `bottleneck.json` with r and base."""
    tensors = collect([(name, p) for name, p in model.named_parameters() if p.requires_grad], keep=write)
    if not write:
        return
    folder.mkdir(parents=True, exist_ok=True)
    description = {"type": "bottleneck", "r": model.bottleneck_r, "activation": "gelu", "base": base}
    (folder / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    save_file({name: t.contiguous() for name, t in tensors.items()}, str(folder / WEIGHTS_FILE))


@torch.no_grad()
def load_bottlenecks(model: nn.Module, folder: Path) -> None:
    """Copy them back, bit for bit. A missing or unknown name is an error."""
    saved = load_file(str(folder / WEIGHTS_FILE))
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if own.keys() != saved.keys():
        raise ValueError(
            f"{folder}: got {len(saved)} adapter tensors, expected {len(own)}; first differences "
            f"{sorted(own.keys() ^ saved.keys())[:3]}; resume with the adapter settings of the saved run"
        )
    for name, parameter in own.items():
        assign(parameter, saved[name])

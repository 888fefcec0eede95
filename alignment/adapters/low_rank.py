"""Adapters of low rank: LoRA (Hu 2021, arXiv 2106.09685) and what changes its scale, its form or its start."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from alignment.adapters.layers import START, seeded, stored_transposed, target_names, train_adapter_only, tuner_layers
from alignment.quantization import is_quantized

Variant = Literal["lora", "rslora", "dora", "pissa"]
CHANGES: dict[Variant, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
}
"""What each asks of peft beside rank and scale."""


def attach_lora(
    model: nn.Module,
    *,
    r: int,
    alpha: float,
    target_modules: tuple[str, ...] | str = "all-linear",
    last_layers: int | None = None,
    seed: int = 0,
    variant: Variant = "lora",
    pissa_iterations: int | None = None,
) -> None:
    """Put low-rank layers into `model` in place; only they (and a scalar head) stay trainable.

    Args:
        variant: `lora` adds alpha / r * B A; `rslora` alpha / sqrt(r) * B A (Kalajdzievski 2023, arXiv 2312.03732);
            `dora` trains the norm of every row of W + alpha / r * B A as well (Liu 2024, arXiv 2402.09353); `pissa`
            trains the r largest singular directions of W and freezes the rest (Meng 2024, arXiv 2404.02948).

        pissa_iterations: subspace iterations of a randomised decomposition (Halko 2011); None decomposes exactly.

    All start as the base: B at zero, or with pissa at what was taken out of W.

    Raises:
        ValueError: pissa on weights of four bits.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = target_names(model, target_modules, last_layers)
    changes = dict(CHANGES[variant])
    if variant == "pissa" and pissa_iterations is not None:
        changes["init_lora_weights"] = f"pissa_niter_{pissa_iterations}"
    if variant == "pissa":
        refuse_quantized(model, variant)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # any float
        lora_dropout=0.0,
        target_modules=names,
        fan_in_fan_out=stored_transposed(model, names),
        **changes,
    )
    with seeded(model, seed):
        inject_adapter_in_model(config, model)
    if variant == "pissa":
        keep_start(model, r=r, alpha=alpha)
    train_adapter_only(model)


def refuse_quantized(model: nn.Module, kind: str) -> None:
    if any(is_quantized(parameter) for parameter in model.parameters()):
        raise ValueError(
            f"adapter.quantization: got four bits with adapter.type={kind}, which changes the weights below, expected "
            "none; set quantization to none, or type to lora, rslora or dora"
        )


@torch.no_grad()
def keep_start(model: nn.Module, *, r: int, alpha: float) -> None:
    """Keep what pissa's factors began with beside them: what the original weights and an export are told by."""
    from peft import LoraConfig

    plain = LoraConfig(r=r, lora_alpha=alpha)  # type: ignore[arg-type]
    for _, layer in tuner_layers(model):
        layer.update_layer(START, r, alpha, config=plain)
        for factors in (layer.lora_A, layer.lora_B):
            # peft leaves the factors in the precision of the decomposition.
            factors["default"].weight.data = factors["default"].weight.data.to(layer.get_base_layer().weight.dtype)
            factors[START].weight.copy_(factors["default"].weight)

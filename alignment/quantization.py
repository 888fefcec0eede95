"""Frozen base weights in four bits for QLoRA (Dettmers 2023): NF4 with double quantization. The only importer of
bitsandbytes."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alignment.sharding import num_elements

Quantization = Literal["none", "nf4"]


def check_quantization(quantization: Quantization) -> None:
    """Refuse what needs a package that is not installed.

    Raises:
        ValueError: `got ..., expected ...; remedy`.
    """
    missing = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if quantization != "none" and missing:
        raise ValueError(
            f"adapter.quantization: got {quantization} without {' and '.join(missing)}, expected it to be installed; "
            'run pip install -e ".[qlora]", or set it to none'
        )


def loading_arguments(quantization: Quantization, *, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` needs to store linear layers in four bits; every head stays as it is."""
    if quantization == "none":
        return {}
    check_quantization(quantization)
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", "score"],
    )
    return {"quantization_config": config, "device_map": {"": device}}


def keep_precision(model: nn.Module) -> None:
    """Compute in the configured dtype with and without gradients.

    On CPUs with bfloat16 instructions bitsandbytes repacks a layer for them at its first call without gradients:
    sampling and scoring would then see other weights than the update.
    """
    layers: list[Any] = list(model.modules())
    for layer in layers:
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def is_quantized(parameter: Tensor) -> bool:
    return getattr(parameter, "quant_state", None) is not None


def dequantized(parameter: Tensor) -> Tensor:
    """The weight that the forward pass multiplies with: of a four-bit parameter in the dtype it was loaded in."""
    if not is_quantized(parameter):
        return parameter.detach()
    from bitsandbytes.functional import dequantize_4bit

    state: Any = getattr(parameter, "quant_state", None)
    return dequantize_4bit(parameter.data, state)


def num_weights(parameter: Tensor) -> int:
    """How many numbers a parameter stands for: a byte of a four-bit one is two of them, and a rank's part of a split
    one counts as the whole."""
    state: Any = getattr(parameter, "quant_state", None)
    return num_elements(parameter) if state is None else int(state.shape.numel())


def stored_bytes(parameter: Tensor) -> int:
    """Memory of a parameter; of a four-bit one with its scales, which double quantization stores in eight bits."""
    state: Any = getattr(parameter, "quant_state", None)
    scales = 0
    while state is not None:
        offset = getattr(state, "offset", None)
        scales += state.absmax.nbytes + (0 if offset is None else offset.nbytes)
        state = getattr(state, "state2", None)
    return parameter.nbytes + scales


def dequantized_bytes(parameter: Tensor) -> int:
    """Size of `dequantized(parameter)`, without computing it."""
    state: Any = getattr(parameter, "quant_state", None)
    return parameter.nbytes if state is None else int(state.shape.numel() * state.dtype.itemsize)

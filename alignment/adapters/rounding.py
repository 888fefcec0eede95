"""Start low-rank factors over a four-bit base at what rounding took from the model's outputs, as far as r directions
can give it back (QERA, Zhang 2025, arXiv 2410.06040; the same optimum without a root of the inputs' covariance)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alignment.adapters.layers import adapter_disabled, is_transposed, seeded, tuner_layers
from alignment.quantization import dequantized, is_quantized

MOST_BYTES = 2**30
"""Of errors and covariances that are held at once; a larger model is gone through in several passes."""
SUBSPACE_ITERATIONS = 8


@torch.no_grad()
def absorb_rounding(
    model: nn.Module,
    run: Callable[[], object],
    original: Callable[[str], Tensor],
    *,
    seed: int = 0,
    most_bytes: int = MOST_BYTES,
) -> None:
    """Move the factors B, A of every adapted four-bit matrix from 0 to the least error of its outputs.

    With the rounding error E = W - W4 and inputs x, the rank-r C that minimises the sum of |(E - C) x|^2 is U U^T E,
    U the r leading eigenvectors of the sum of (E x)(E x)^T: Eckart-Young on the outputs. The rows of A keep the length
    of an ordinary start, so that a learning rate means the same.

    Args:
        run: forwards over the inputs that count, without padding; called once or more.
        original: a matrix's weight (out, in) before it was rounded, by the linear layer's name.
        seed: of the subspace iteration (Halko 2011).

    Raises:
        ValueError: a weight of another shape.
    """
    layers = [(name, layer) for name, layer in tuner_layers(model) if is_quantized(layer.get_base_layer().weight)]
    for group in _groups(layers, most_bytes):
        errors = {name: _error(name, layer.get_base_layer(), original(name)) for name, layer in group}
        # Of the rounded model whatever was started before: it does not matter in how many passes.
        with adapter_disabled(model):
            covariances = _covariances(group, errors, run)
        for name, layer in group:
            with seeded(model, seed):
                _start(layer, errors[name], covariances[name])


def _groups(layers: Sequence[tuple[str, Any]], most_bytes: int) -> Iterator[list[tuple[str, Any]]]:
    group: list[tuple[str, Any]] = []
    held = 0
    for name, layer in layers:
        outputs, inputs = layer.get_base_layer().weight.quant_state.shape
        size = 4 * outputs * (outputs + inputs)
        if group and held + size > most_bytes:
            yield group
            group, held = [], 0
        group.append((name, layer))
        held += size
    if group:
        yield group


def _error(name: str, layer: Any, weight: Tensor) -> Tensor:
    rounded = dequantized(layer.weight).float()
    weight = weight.T if is_transposed(getattr(layer, "source_cls", type(layer))) else weight
    if weight.shape != rounded.shape:
        raise ValueError(
            f"training.calibration_examples: got {name} of shape {[*weight.shape]} in the model's files, expected "
            f"{[*rounded.shape]}; set it to 0"
        )
    return weight.to(rounded) - rounded


def _covariances(
    group: Sequence[tuple[str, Any]], errors: dict[str, Tensor], run: Callable[[], object]
) -> dict[str, Tensor]:
    """The sum of (E x)(E x)^T over all inputs x, for each matrix (out, out)."""
    sums = {name: error.new_zeros(len(error), len(error)) for name, error in errors.items()}

    def observe(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
            lost = inputs[0].flatten(0, -2).float() @ errors[name].T
            sums[name].addmm_(lost.T, lost)

        return hook

    hooks = [layer.get_base_layer().register_forward_hook(observe(name)) for name, layer in group]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return sums


def _start(layer: Any, error: Tensor, covariance: Tensor) -> None:
    r, scale = layer.r["default"], layer.scaling["default"]
    wanted = min(r, len(error))
    directions, _, _ = torch.svd_lowrank(covariance, q=min(len(error), wanted + 16), niter=SUBSPACE_ITERATIONS)
    directions = directions[:, :wanted]
    rows = directions.T @ error
    # What an ordinary start draws from: uniform, of variance 1 / (3 inputs).
    length = rows.norm(dim=1) * math.sqrt(3)
    # A direction in which nothing is lost starts as usual: a row of zeros would never learn.
    some = length > torch.finfo(rows.dtype).tiny
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    a[:wanted][some] = (rows / length.unsqueeze(1))[some].to(a)
    b[:, :wanted][:, some] = (directions * (length / scale))[:, some].to(b)

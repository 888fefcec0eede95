"""The one place where losses become a scalar: their sum over a count, which may be that of a larger batch."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from alignment.masked import masked_mean, masked_sum

Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum"]
Metrics = dict[str, Tensor]


def aggregate(per_token: Tensor, mask: Tensor, *, mode: str, denominator: float | Tensor | None = None) -> Tensor:
    """Reduce a loss to a scalar. Rows without a valid token count neither above nor below the line.

    Args:
        per_token: (B, T); "token_mean" takes any shape, so (B,) serves losses per sequence.
        mask: the same shape, bool.
        mode: "token_mean": sum over valid tokens / their number. "sequence_mean": each sequence's mean over its
            tokens, then the mean over sequences. "sequence_sum": each sequence's sum, then the mean over sequences.
        denominator: the global number of tokens ("token_mean") or of sequences with a valid token (the others), when
            this is a part of a larger batch; takes the place of the local number.

    Returns:
        A scalar; 0, still attached to the graph, when nothing is valid.
    """
    if mode not in get_args(Aggregation):
        raise ValueError(f"mode: got {mode!r}, expected one of {get_args(Aggregation)}; choose one of them")
    if denominator is not None and not float(denominator) > 0:
        raise ValueError(
            f"denominator: got {float(denominator)}, expected the positive count of the global batch; "
            "skip a minibatch without valid tokens"
        )
    if mode == "token_mean":
        total, count = masked_sum(per_token, mask), mask.bool().sum()
    else:
        if per_token.ndim != 2:
            raise ValueError(f"{mode}: got shape {tuple(per_token.shape)}, expected (B, T); use token_mean for (B,)")
        per_sequence = masked_mean if mode == "sequence_mean" else masked_sum
        total, count = per_sequence(per_token, mask, dim=1).sum(), mask.bool().any(1).sum()
    return total / (count.clamp(min=1) if denominator is None else denominator)


def batch_mean(x: Tensor, denominator: float | Tensor | None = None) -> Tensor:
    """`aggregate` of numbers that are all valid, (B,)."""
    return aggregate(x, torch.ones_like(x, dtype=torch.bool), mode="token_mean", denominator=denominator)


def check_shapes(mask: Tensor, **tensors: Tensor) -> None:
    """
    Raises:
        ValueError: one of `tensors` has another shape than `mask`: it would be broadcast without a word.
    """
    wrong = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor.shape != mask.shape}
    if wrong:
        raise ValueError(f"shapes: got {wrong}, expected {tuple(mask.shape)}; squeeze or expand them to one shape")

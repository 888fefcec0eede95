"""Masked statistics: what a mask hides may be NaN or inf and reaches neither value, gradient nor metric.

`torch.where` comes before any arithmetic: multiplying by the mask would keep 0 * NaN = NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

WHITEN_EPS = 1e-8


def as_float(x: Tensor) -> Tensor:
    """float32, or float64 where it is float64 already: the precision of every statistic and loss."""
    return x if x.dtype == torch.float64 else x.float()


def zero_masked(x: Tensor, mask: Tensor) -> Tensor:
    """`x` where `mask` is true, 0 elsewhere, in float32 (float64 stays float64). Both of one shape.

    Raises:
        ValueError: shapes differ; broadcasting (B,) against (B, 1) would silently give (B, B).
    """
    if x.shape != mask.shape:
        raise ValueError(
            f"mask: got shape {tuple(mask.shape)} for values of shape {tuple(x.shape)}, expected the same shape; "
            "squeeze or expand one of them"
        )
    return torch.where(mask.bool(), as_float(x), 0.0)


def masked_sum(x: Tensor, mask: Tensor, *, dim: int | None = None) -> Tensor:
    """Sum of `x` where `mask` is true: a scalar, or along `dim`."""
    return zero_masked(x, mask).sum(dim)


def masked_mean(x: Tensor, mask: Tensor, *, dim: int | None = None) -> Tensor:
    """Mean of `x` where `mask` is true: a scalar, or along `dim`. An empty mask gives 0."""
    return masked_sum(x, mask, dim=dim) / mask.bool().sum(dim).clamp(min=1)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Biased variance (divided by n, not n - 1) of `x` where `mask` is true. An empty mask gives 0."""
    return masked_mean(_centred(x, mask) ** 2, mask)


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Scale to unit variance: (x - mean) / sqrt(var + 1e-8), 0 where masked (Ziegler 2019).

    Args:
        x, mask: any shape, the same. The variance is biased.
        shift_mean: False adds the mean back, which is what rewards need; advantages lose theirs.

    Fewer than two valid elements have no spread to divide by: they pass through.
    """
    if int(mask.bool().sum()) < 2:
        return zero_masked(x, mask)
    centred = _centred(x, mask)
    whitened = centred * torch.rsqrt(masked_mean(centred**2, mask) + WHITEN_EPS)
    return whitened if shift_mean else zero_masked(whitened + masked_mean(x, mask), mask)


def _centred(x: Tensor, mask: Tensor) -> Tensor:
    """`x` minus its masked mean, 0 where masked."""
    x = zero_masked(x, mask)
    centred = x - masked_mean(x, mask)
    # The float mean of equal numbers is off by a rounding error, which 1 / std of a constant would blow up.
    return zero_masked(centred - masked_mean(centred, mask), mask)

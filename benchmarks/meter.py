"""The matrix-product rate of this machine: what a benchmark compares its own rates with."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MatmulPeak:
    """Rates of fp32 matrix products, in GFLOP/s (2 m k n operations each), best of the repetitions."""

    square: float  # (2048, 2048) @ (2048, 2048)
    model: float  # the feed-forward product of the benchmark's model
    threads: int


def matmul_peak(seconds: float = 1.0, model_shape: tuple[int, int, int] = (1632, 576, 1536)) -> MatmulPeak:
    """Measure what this machine's matrix products reach now, with the thread count torch has.

    Args:
        seconds: time spent on each of the two shapes.
        model_shape: (m, k, n) of the second product; default the feed-forward layer of SmolLM2-135M over
            16 sequences of 102 tokens.

    Returns:
        The two rates and the number of threads.
    """
    return MatmulPeak(_rate(2048, 2048, 2048, seconds), _rate(*model_shape, seconds), torch.get_num_threads())


def _rate(m: int, k: int, n: int, seconds: float) -> float:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)
    out = torch.empty(m, n)
    torch.mm(left, right, out=out)
    best, end = float("inf"), time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        torch.mm(left, right, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * m * k * n / best / 1e9

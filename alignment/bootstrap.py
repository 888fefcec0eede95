"""How sure a before-and-after difference is."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch

CHUNK = 1 << 22


def paired_bootstrap(
    before: Sequence[float],
    after: Sequence[float],
    *,
    groups: Sequence[Hashable] | None = None,
    num_resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """Mean of `after - before` over items, with the percentile interval of resampled items (Efron 1979).

    Item i of both is the same item, so what makes items differ from each other cancels.

    Args:
        before, after: one finite number per item.
        groups: of each item what it shares with others, e.g. a prompt. Whole groups are then resampled (the cluster
            bootstrap, Davison and Hinkley 1997, section 3.8): items of a group tell less than as many apart would.
        num_resamples: bootstrap samples.
        seed: of the resampling.
        level: coverage of the interval, between 0 and 1.

    Returns:
        (gain, low, high).

    Raises:
        ValueError: no items, different lengths, a number that is not finite, or a level outside (0, 1).
    """
    if len(before) != len(after) or len(before) == 0:
        raise ValueError(f"got {len(before)} and {len(after)} items, expected the same number, at least 1; pair them")
    if not all(math.isfinite(value) for value in (*before, *after)):
        raise ValueError("got an item that is NaN or infinite, expected finite numbers; leave that item out of both")
    if not 0 < level < 1 or num_resamples < 1:
        raise ValueError(f"got level={level}, num_resamples={num_resamples}, expected 0 < level < 1 and at least 1")
    if groups is not None and len(groups) != len(after):
        raise ValueError(f"got {len(groups)} groups for {len(after)} items, expected one for each; pair them")
    gains = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    sums, counts = _by_group(gains, groups)
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, CHUNK // len(sums))
    means = []
    for start in range(0, num_resamples, rows):
        shape = (min(rows, num_resamples - start), len(sums))
        drawn = torch.randint(len(sums), shape, generator=generator)
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(torch.cat(means), tails).tolist()
    return float(gains.mean()), low, high


def _by_group(values: torch.Tensor, groups: Sequence[Hashable] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum and number of the values of each group; without groups each value is one."""
    if groups is None:
        return values, torch.ones_like(values)
    numbers = {group: k for k, group in enumerate(dict.fromkeys(groups))}
    index = torch.tensor([numbers[group] for group in groups])
    nothing = torch.zeros(len(numbers), dtype=values.dtype)
    return nothing.index_add(0, index, values), nothing.index_add(0, index, torch.ones_like(values))

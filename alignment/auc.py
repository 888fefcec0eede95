"""How well a number tells two kinds of items apart, whatever its scale, and how sure that is."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 22


def auc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """Chance that an item of the positive kind has a higher score than one of the other, a tie counting half: the area
    under the ROC curve (Hanley and McNeil 1982).

    Raises:
        ValueError: a kind is missing.
    """
    return float(_wins(scores, positive).mean())


def auc_gain(
    before: Sequence[float],
    after: Sequence[float],
    positive: Sequence[bool],
    *,
    groups: Sequence[Hashable] | None = None,
    num_resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Any]:
    """`before` and `after`, the AUC of either score, and `after_ci95` and `gain_ci95`, percentile intervals.

    Items are resampled within each kind (stratified), the same ones for both scores.

    Args:
        before, after: a score per item.
        positive: its kind.
        groups: of each item what it shares with others, e.g. a prompt; those of a kind are drawn together, see
            `alignment.bootstrap.paired_bootstrap`.
    """
    wins = torch.stack([_wins(before, positive), _wins(after, positive)])  # (2, P, N)
    num_positive, num_other = wins.shape[1:]
    names = list(range(len(positive))) if groups is None else groups
    kinds = [[name for name, own in zip(names, positive, strict=True) if bool(own) == kind] for kind in (True, False)]
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, CHUNK // max(num_positive, num_other))
    found = []
    for start in range(0, num_resamples, rows):
        count = min(rows, num_resamples - start)
        own, others = (_resample(count, kind, generator) for kind in kinds)
        couples = own.sum(1) * others.sum(1)
        found.append(torch.stack([((own @ one) * others).sum(1) / couples for one in wins]))
    both = torch.cat(found, 1)  # (2, R)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    first, last = wins.mean((1, 2)).tolist()
    return {
        "before": first,
        "after": last,
        "after_ci95": torch.quantile(both[1], tails).tolist(),
        "n": num_positive + num_other,
        "gain_ci95": torch.quantile(both[1] - both[0], tails).tolist(),
        "higher_is_better": True,
    }


def _wins(scores: Sequence[float], positive: Sequence[bool]) -> Tensor:
    """(P, N) float64: 1 where the positive item has the higher score, one half where they tie."""
    values, kind = torch.tensor(scores, dtype=torch.float64), torch.tensor(positive, dtype=torch.bool)
    if len(values) != len(kind) or kind.all() or not kind.any():
        raise ValueError(
            f"got {len(values)} scores of {int(kind.sum())} positive items and {int((~kind).sum())} others, expected "
            "some of both and a score for each; hold out more rows"
        )
    gaps = values[kind].unsqueeze(1) - values[~kind]
    return (gaps.sign() + 1) / 2


def _resample(count: int, groups: Sequence[Hashable], generator: torch.Generator) -> Tensor:
    """(count, items) how often each item comes when as many groups are drawn with replacement as there are."""
    numbers = {group: k for k, group in enumerate(dict.fromkeys(groups))}
    drawn = torch.randint(len(numbers), (count, len(numbers)), generator=generator)
    times = torch.zeros(drawn.shape, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())
    return times[:, torch.tensor([numbers[group] for group in groups])]

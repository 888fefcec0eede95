"""How high the one right candidate stands, with intervals. Equal scores share their places: no order is assumed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alignment.bootstrap import paired_bootstrap


def hit_rate_at_k(positive: Tensor, negatives: Tensor, *, k: int) -> Tensor:
    """Whether the positive is among the first k.

    With g negatives above it and t beside it, a random order of equal scores puts it at each of the ranks
    g+1 .. g+t+1 as often: the probability of a rank up to k is min(max(k - g, 0), t+1) / (t+1).

    Args:
        positive: (C,) scores, higher is better.
        negatives: (C, N) scores.
        k: from 1.

    Returns:
        (C,) float64 in [0, 1].

    Raises:
        ValueError: a score that is NaN, or shapes that do not fit.
    """
    above, beside = _places(positive, negatives, k)
    return (k - above).clamp(min=0).minimum(beside + 1) / (beside + 1)


def ndcg_at_k(positive: Tensor, negatives: Tensor, *, k: int) -> Tensor:
    """1 / log2(rank + 1) of the positive, 0 beyond rank k: normalised discounted cumulative gain (Järvelin and
    Kekäläinen 2002) of one relevant item, whose ideal is 1. Mean over the ranks that equal scores may take.

    Arguments, shape and errors as `hit_rate_at_k`.
    """
    above, beside = _places(positive, negatives, k)
    most = negatives.shape[1] + 1
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), _discounts(k, most).cumsum(0)])
    first = above.long()
    return (sums[first + beside.long() + 1] - sums[first]) / (beside + 1)


def chance(num_candidates: int, *, k: int) -> tuple[float, float]:
    """Hit rate and NDCG of a random order of so many candidates: min(k, n) / n, and the mean of the discounts."""
    discounts = _discounts(k, num_candidates)
    return min(k, num_candidates) / num_candidates, float(discounts.mean())


def mean_by_user(values: Tensor, users: Sequence[int]) -> list[float]:
    """(C,) numbers of cases to one for each user, in the order of their first case: cases of one person are not
    independent, so what is resampled is the person."""
    by_user: dict[int, list[float]] = {}
    for value, user in zip(values.tolist(), users, strict=True):
        by_user.setdefault(user, []).append(value)
    return [sum(own) / len(own) for own in by_user.values()]


def gain_report(before: Tensor, after: Tensor, users: Sequence[int], *, seed: int) -> dict[str, Any]:
    """One row of `held_out`: means over users, and the 95 % interval of their difference by paired bootstrap.

    Args:
        before, after: (C,) a metric of each case, by two methods.
        users: whose case it is.
    """
    means = [mean_by_user(values, users) for values in (before, after)]
    _, low, high = paired_bootstrap(*means, seed=seed)
    return {
        "before": sum(means[0]) / len(means[0]),
        "after": sum(means[1]) / len(means[1]),
        "n": len(means[0]),
        "gain_ci95": [low, high],
        "higher_is_better": True,
    }


def _places(positive: Tensor, negatives: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(C,) float64 each: negatives with a higher score, and with the same."""
    if negatives.ndim != 2 or positive.shape != negatives.shape[:1] or k < 1:
        raise ValueError(
            f"got scores of shape {tuple(positive.shape)} and {tuple(negatives.shape)} with k={k}, expected (C,) and "
            "(C, N) with k at least 1; give each case one positive"
        )
    if bool(positive.isnan().any() | negatives.isnan().any()):
        raise ValueError("got a score that is NaN, expected numbers; a candidate without a score has no place")
    own = positive.unsqueeze(1)
    return (negatives > own).sum(1).double(), (negatives == own).sum(1).double()


def _discounts(k: int, num_candidates: int) -> Tensor:
    """(num_candidates,) what each rank is worth."""
    ranks = torch.arange(1, num_candidates + 1, dtype=torch.float64)
    return torch.where(ranks <= k, 1 / torch.log2(ranks + 1), 0.0)

"""From scores of candidates to the numbers of a report: one way for every method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from alignment.data.recommendation_cases import PROTOCOLS, RecommendationCase
from alignment.recommendation_metrics import gain_report, hit_rate_at_k, mean_by_user, ndcg_at_k

CaseScores = Sequence[float]
"""Of the `films` of a case, in their order."""


def case_metrics(
    cases: Sequence[RecommendationCase], scores: Sequence[CaseScores], *, k: int = 10
) -> dict[str, Tensor]:
    """`PROTOCOL/hit_rate` and `PROTOCOL/ndcg` among the first k: (C,) float64 each, a number a case.

    Raises:
        ValueError: not a score for each film of each case, or one that is NaN.
    """
    found: dict[str, Tensor] = {}
    by_film = [dict(zip(case.films, own, strict=True)) for case, own in zip(cases, scores, strict=True)]
    for protocol in PROTOCOLS:
        rows = [[own[film] for film in case.candidates(protocol)] for case, own in zip(cases, by_film, strict=True)]
        table = torch.tensor(rows, dtype=torch.float64)
        for name, metric in (("hit_rate", hit_rate_at_k), ("ndcg", ndcg_at_k)):
            found[f"{protocol}/{name}"] = metric(table[:, 0], table[:, 1:], k=k)
    return found


def scores_by(
    score: Callable[[Sequence[int], Sequence[int]], CaseScores], cases: Sequence[RecommendationCase]
) -> list[CaseScores]:
    """What `score(liked, candidates)` says of every case: a baseline's scores."""
    return [score(case.liked, case.films) for case in cases]


def means(cases: Sequence[RecommendationCase], metrics: dict[str, Tensor]) -> dict[str, float]:
    """Of each metric the mean over people, of whom each counts once."""
    users = [case.user for case in cases]
    by_user = {name: mean_by_user(values, users) for name, values in metrics.items()}
    return {name: sum(values) / len(values) for name, values in by_user.items()}


def gains(
    cases: Sequence[RecommendationCase], before: dict[str, Tensor], after: dict[str, Tensor], *, seed: int
) -> dict[str, dict[str, Any]]:
    """Rows of `held_out`: each metric by one method and by another, or before and after, with the interval of the
    difference over people."""
    users = [case.user for case in cases]
    return {name: gain_report(before[name], after[name], users, seed=seed) for name in before}

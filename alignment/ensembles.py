"""Several reward models' scores of the same answers as one score each, and how far the models disagree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Combination = Literal["mean", "min", "mean_minus_std"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EnsembleScores:
    """One entry per answer; None where a member could not score it."""

    scores: list[float | None]
    disagreement: list[float | None]
    """Standard deviation of the members' scores, over all of them: 0 for one member."""


def score_ensemble(
    members: Sequence[Sequence[float | None]], *, how: str = "mean", std_coef: float = 1.0
) -> EnsembleScores:
    """Combine the members' scores of N answers.

    "mean"; "min", the worst case of Coste 2023 (arXiv 2310.02743); "mean_minus_std", the mean minus `std_coef` times
    the standard deviation: their uncertainty-weighted score, which has the variance there, in the unit of the scores.
    The members should be on one scale: standardise each first.

    A sum is rounded once, so no result depends on the order of the members, and one member alone is itself.

    Args:
        members: M lists of N scores, None for an answer that could not be scored.
        std_coef: not negative; read by "mean_minus_std".

    Raises:
        ValueError: no member, lists of different lengths, a score that is NaN or infinite, an unknown `how`.
    """
    if how not in get_args(Combination):
        raise ValueError(f"how: got {how!r}, expected one of {get_args(Combination)}; choose one of them")
    if not (std_coef >= 0 and math.isfinite(std_coef)):
        raise ValueError(f"std_coef: got {std_coef}, expected a finite number from 0; correct it")
    lengths = [len(member) for member in members]
    if not members or len(set(lengths)) > 1:
        raise ValueError(f"members: got scores of {lengths} answers, expected one length, of one member at least")
    combined = [_combine(column, how, std_coef) for column in zip(*members, strict=True)]
    return EnsembleScores(
        scores=[score for score, _ in combined], disagreement=[disagreement for _, disagreement in combined]
    )


def _combine(column: Sequence[float | None], how: str, std_coef: float) -> tuple[float | None, float | None]:
    known = [score for score in column if score is not None]
    if not all(map(math.isfinite, known)):
        raise ValueError(
            f"members: got scores {known} of one answer, expected finite numbers; None where there is none"
        )
    if len(known) < len(column):
        return None, None
    mean = math.fsum(known) / len(known)
    std = math.sqrt(math.fsum((score - mean) ** 2 for score in known) / len(known))
    score = {"mean": mean, "min": min(known), "mean_minus_std": mean - std_coef * std}[how]
    return score, std

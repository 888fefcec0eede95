"""From the scores of records to a loss: one objective for each kind of judgement, chosen by the records themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from alignment.judgements import Judgement, LabelledAnswer, Ranking, RatedAnswer, SteppedAnswer, kind_of
from alignment.losses import JudgementKind, Metrics, RankingKind, judgement_loss, ranking_loss, reward_model_loss
from alignment.types import PreferencePair, pad_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Objectives:
    """How each kind of record is learnt. Records of one call are of one kind."""

    center_coef: float = 0.0
    """Weight of the squared sum of two scores, of pairs and pairwise rankings."""
    ranking: RankingKind = "pairwise"
    rating: JudgementKind = "cross_entropy"
    """Labels and steps are always learnt by cross-entropy."""
    weigh_agreement: bool = False
    """Let a rating count by its raters' agreement."""

    def check(self, records: Sequence[Judgement]) -> None:
        """Refuse records that this cannot learn.

        Raises:
            ValueError: a tie in a ranking with plackett_luce.
        """
        if self.ranking != "plackett_luce":
            return
        tied = [r.id for r in records if isinstance(r, Ranking) and len(set(r.ranks)) < len(r.ranks)]
        if tied:
            raise ValueError(
                f"training.ranking_loss: got plackett_luce with {len(tied)} rankings that have ties (the first is "
                f"{tied[0]}), expected none; set it to pairwise"
            )

    def denominator(self, records: Sequence[Judgement]) -> float:
        """What the loss of `records` is divided by: their number; of ratings the sum of weights, of steps theirs."""
        kind = kind_of(records[0])
        if kind == "steps":
            return float(sum(len(cast(SteppedAnswer, record).targets) for record in records))
        if kind == "ratings":
            return math.fsum(self._weight(cast(RatedAnswer, record)) for record in records)
        return float(len(records))

    def loss(self, records: Sequence[Judgement], scores: Tensor, *, denominator: float) -> tuple[Tensor, Metrics]:
        """`(loss, metrics)` of the scores (N,) at the records' reads, in their order."""
        kind = kind_of(records[0])
        if kind == "pairs":
            return self._pairs(cast(Sequence[PreferencePair], records), scores, denominator)
        if kind == "rankings":
            return self._rankings(cast(Sequence[Ranking], records), scores, denominator)
        if kind == "ratings":
            rated = cast(Sequence[RatedAnswer], records)
            targets = scores.new_tensor([record.target for record in rated])
            weights = scores.new_tensor([self._weight(record) for record in rated])
            return judgement_loss(scores, targets, weights=weights, kind=self.rating, denominator=denominator)
        if kind == "labels":
            labels = [record.target for record in cast(Sequence[LabelledAnswer], records)]
        else:
            labels = [target for record in cast(Sequence[SteppedAnswer], records) for target in record.targets]
        return judgement_loss(scores, scores.new_tensor(labels), denominator=denominator)

    def _pairs(self, pairs: Sequence[PreferencePair], scores: Tensor, denominator: float) -> tuple[Tensor, Metrics]:
        chosen, rejected = scores.view(-1, 2).unbind(1)
        margin = scores.new_tensor([pair.margin for pair in pairs])
        return reward_model_loss(
            chosen, rejected, margin=margin, center_coef=self.center_coef, denominator=denominator
        )

    def _rankings(self, rankings: Sequence[Ranking], scores: Tensor, denominator: float) -> tuple[Tensor, Metrics]:
        sizes = [len(record.ranks) for record in rankings]
        ranks = pad_rows([torch.tensor(record.ranks) for record in rankings]).to(scores.device)
        mask = torch.arange(max(sizes), device=scores.device) < torch.tensor(sizes, device=scores.device).unsqueeze(1)
        return ranking_loss(
            pad_rows(list(scores.split(sizes))),
            ranks,
            mask,
            kind=self.ranking,
            center_coef=self.center_coef if self.ranking == "pairwise" else 0.0,
            denominator=denominator,
        )

    def _weight(self, record: RatedAnswer) -> float:
        return record.agreement if self.weigh_agreement else 1.0


def held_out_loss(
    objectives: Objectives, records: Sequence[Judgement], scores: Sequence[Sequence[float]]
) -> dict[str, float]:
    """Loss and metrics of a whole set of records from their scores."""
    flat = torch.tensor([score for row in scores for score in row])
    loss, metrics = objectives.loss(records, flat, denominator=objectives.denominator(records))
    named = {"loss": loss, "accuracy": metrics["accuracy"]}
    return {f"validation/{name}": float(value) for name, value in named.items()}

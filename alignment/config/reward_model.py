"""The reward-model stage."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from alignment.config.base import Config, NonNegative, NonNegativeFloat, Positive
from alignment.config.data import PreferenceDataConfig, SourceConfig
from alignment.config.model import (
    AdapterConfig,
    MicroBatchConfig,
    ModelConfig,
    OptimizerConfig,
    refuse_adaptive_rate,
    refuse_float16_training,
    refuse_idle_patience,
    refuse_small_budget,
    refuse_unmergeable,
)
from alignment.config.run import RunConfig

JudgementKind = Literal["auto", "pairs", "rankings", "ratings", "labels", "steps"]


class RewardDataConfig(PreferenceDataConfig):
    """Judgements of answers, of one kind."""

    kind: JudgementKind = "auto"
    """What the rows are; `auto` goes by the columns of the first one. It decides the loss."""
    also: tuple[SourceConfig, ...] = ()
    """More sources of rows of that kind, to train on alone: what is held out is of `source`."""
    report_by: str = "kind"
    """Column by whose values the report tells accuracies apart; a row without it goes by its source's name."""
    on_long: Literal["error", "skip"] = "error"
    """What becomes of a row whose prompt leaves no room for an answer, or whose answers differ only beyond max_tokens:
    it is refused, or left out and counted."""
    end_cut_answers: bool = False
    """Put the end token behind an answer that max_tokens cut, as a hosted model reads it: every score is then read at
    the same token, which is sooner learnt."""
    margin_key: str | None = None
    """Column with the margin of a pair, a number from 0, in scores; None has none."""
    max_answers: Annotated[int, Field(ge=2)] = 8
    """Answers of a ranking, at most; one with more is refused. They share a forward."""
    step_separator: Annotated[str, Field(min_length=1)] = "\n"
    """What stands between the steps of an answer."""

    @property
    def sequences_per_row(self) -> int:
        """Sequences that share a forward, at most; `auto` counts on pairs."""
        return {"auto": 2, "pairs": 2, "rankings": self.max_answers}.get(self.kind, 1)


class RewardModelTrainingConfig(MicroBatchConfig):
    """The reward-model stage."""

    adapter: AdapterConfig = AdapterConfig()
    """What is trained of it, merged at the end; the head always is."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=5e-5)
    """Its optimiser."""
    batch_size: Positive = 8
    """Rows per optimiser step: pairs, rankings, or answers."""
    micro_batch_size: Positive | None = None
    """Rows per forward on one worker, at most. None is 4, and no bound where max_tokens_per_micro_batch is set."""
    max_tokens_per_micro_batch: Positive | None = None
    """Tokens per forward on one worker, at most: of all answers of every row, padding included. None does not
    bound."""
    center_coef: NonNegativeFloat = 0.01
    """Weight of the squared sum of two scores, for pairs and pairwise rankings (Eisenstein 2023)."""
    ranking_loss: Literal["pairwise", "plackett_luce"] = "pairwise"
    """Of rankings: every pair of a ranking by Bradley-Terry, or one choice after the other."""
    rating_loss: Literal["cross_entropy", "squared"] = "cross_entropy"
    """Of ratings: between the sigmoid of the score and the mean of the raters."""
    weigh_agreement: bool = False
    """Let a rating count by its raters' agreement: 1 minus their standard deviation."""
    validate_every: NonNegative = 0
    """Steps between validations on the held-out rows; 0 validates before the first and after the last step."""
    patience: Positive | None = None
    """End the run after so many validations in a row without a better loss; None runs to the end. The step of the best
    validation is what `final` holds."""

    @model_validator(mode="after")
    def _rate_is_its_own(self) -> RewardModelTrainingConfig:
        refuse_adaptive_rate(self.optimizer, "training.optimizer")
        return self

    @model_validator(mode="after")
    def _patience_has_validations(self) -> RewardModelTrainingConfig:
        refuse_idle_patience(self.patience, self.validate_every)
        return self


class RewardModelRunConfig(Config):
    """Everything of a reward-model run but the machines."""

    run: RunConfig = RunConfig()
    """The run itself; num_steps counts optimiser steps."""
    data: RewardDataConfig = RewardDataConfig()
    """Judgements of answers."""
    model: ModelConfig = ModelConfig()
    """Backbone."""
    training: RewardModelTrainingConfig = RewardModelTrainingConfig()
    """The stage."""

    @model_validator(mode="after")
    def _dtype_can_be_trained(self) -> RewardModelRunConfig:
        refuse_float16_training(self.model)
        return self

    @model_validator(mode="after")
    def _adapter_can_be_merged(self) -> RewardModelRunConfig:
        refuse_unmergeable(self.training.adapter, "training", "a reward model is written as plain weights")
        return self

    @model_validator(mode="after")
    def _validation_has_rows(self) -> RewardModelRunConfig:
        if self.training.validate_every and not self.data.held_out:
            raise ValueError(
                f"training.validate_every: got {self.training.validate_every} with data.held_out=0, expected rows to "
                "validate on; set data.held_out, or training.validate_every to 0"
            )
        return self

    @model_validator(mode="after")
    def _micro_batches_hold_a_row(self) -> RewardModelRunConfig:
        longest, answers = self.data.max_tokens, self.data.sequences_per_row
        what = f"the longest row, {answers} x data.max_tokens {longest}"
        refuse_small_budget(self.training, "training", answers * longest, what)
        return self

"""The Bradley-Terry stage."""

from __future__ import annotations

from pydantic import model_validator

from alignment.config.base import Config, NonNegativeFloat, Positive
from alignment.config.data import PreferenceDataConfig
from alignment.config.model import (
    AdapterConfig,
    MicroBatchConfig,
    ModelConfig,
    OptimizerConfig,
    refuse_adaptive_rate,
    refuse_float16_training,
    refuse_small_budget,
    refuse_unmergeable,
)
from alignment.config.run import RunConfig


class RewardModelTrainingConfig(MicroBatchConfig):
    """The Bradley-Terry stage."""

    adapter: AdapterConfig = AdapterConfig()
    """What is trained of it, merged at the end; the head always is."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=5e-5)
    """Its optimiser."""
    batch_size: Positive = 8
    """Pairs per optimiser step."""
    micro_batch_size: Positive | None = None
    """Pairs per forward on one worker, at most. None is 4, and no bound where max_tokens_per_micro_batch is set."""
    max_tokens_per_micro_batch: Positive | None = None
    """Tokens per forward on one worker, at most: of both answers of every pair, padding included. None does not
    bound."""
    center_coef: NonNegativeFloat = 0.01
    """Weight of the squared sum of the two scores (Eisenstein 2023)."""

    @model_validator(mode="after")
    def _rate_is_its_own(self) -> RewardModelTrainingConfig:
        refuse_adaptive_rate(self.optimizer, "training.optimizer")
        return self


class RewardModelRunConfig(Config):
    """Everything of a reward-model run but the machines."""

    run: RunConfig = RunConfig()
    """The run itself; num_steps counts optimiser steps."""
    data: PreferenceDataConfig = PreferenceDataConfig()
    """Pairs."""
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
    def _micro_batches_hold_a_pair(self) -> RewardModelRunConfig:
        what = f"the longest pair, twice data.max_tokens {self.data.max_tokens}"
        refuse_small_budget(self.training, "training", 2 * self.data.max_tokens, what)
        return self

"""The supervised stage."""

from __future__ import annotations

from pydantic import model_validator

from alignment.config.base import Config, NonNegative, NonNegativeFloat, Positive
from alignment.config.data import SftDataConfig, SftSourceConfig
from alignment.config.model import (
    VIRTUAL_TOKEN_TYPES,
    AdapterConfig,
    MicroBatchConfig,
    ModelConfig,
    OptimizerConfig,
    refuse_adapter_for_model,
    refuse_adaptive_rate,
    refuse_float16_training,
    refuse_idle_patience,
    refuse_small_budget,
)
from alignment.config.run import RunConfig


class SftTrainingConfig(MicroBatchConfig):
    """Supervised fine-tuning."""

    adapter: AdapterConfig = AdapterConfig()
    """What is trained: every parameter, or one of the methods of docs/peft.md."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=2e-5, decay="cosine")
    """Its optimiser."""
    batch_size: Positive = 8
    """Examples per optimiser step."""
    calibration_examples: NonNegative = 0
    """The first so many examples of the first epoch start lora and rslora over four bits: the factors begin where they
    give the outputs back what rounding took, as far as their rank allows (Zhang 2025). 0 begins at rounded weights."""
    neftune_alpha: NonNegativeFloat = 0.0
    """Noise on the embeddings while training, of size alpha / sqrt(tokens x width) (NEFTune, Jain 2023); 0 adds none,
    5 is customary."""
    validate_every: NonNegative = 0
    """Steps between validations on the held-out examples; 0 validates before the first and after the last step."""
    patience: Positive | None = None
    """End the run after so many validations in a row without a better loss; None runs to the end. The step of the best
    validation is what `final` holds."""

    @model_validator(mode="after")
    def _rate_is_its_own(self) -> SftTrainingConfig:
        refuse_adaptive_rate(self.optimizer, "training.optimizer")
        return self

    @model_validator(mode="after")
    def _noise_reaches_embeddings(self) -> SftTrainingConfig:
        if self.neftune_alpha and self.adapter.type in VIRTUAL_TOKEN_TYPES:
            raise ValueError(
                f"training.neftune_alpha: got {self.neftune_alpha:g} with adapter.type={self.adapter.type}, expected "
                "0: what is trained stands in front of the embeddings; set it to 0, or choose another adapter.type"
            )
        return self

    @model_validator(mode="after")
    def _calibration_has_an_error(self) -> SftTrainingConfig:
        adapter = self.adapter
        if self.calibration_examples and (adapter.quantization == "none" or adapter.type not in ("lora", "rslora")):
            raise ValueError(
                f"training.calibration_examples: got {self.calibration_examples} with adapter.type={adapter.type} and "
                f"adapter.quantization={adapter.quantization}, expected lora or rslora over nf4, which can start from "
                "the error of rounding; set it to 0, or choose them"
            )
        return self

    @model_validator(mode="after")
    def _patience_has_validations(self) -> SftTrainingConfig:
        refuse_idle_patience(self.patience, self.validate_every)
        return self


class SftRunConfig(Config):
    """Everything of a supervised run but the machines."""

    run: RunConfig = RunConfig()
    """The run itself; num_steps counts optimiser steps."""
    data: SftDataConfig = SftDataConfig(sources=(SftSourceConfig(asset="treatment-plan-answers"),))
    """Conversations and texts."""
    model: ModelConfig = ModelConfig()
    """What is fine-tuned."""
    training: SftTrainingConfig = SftTrainingConfig()
    """The stage."""

    @model_validator(mode="after")
    def _model_can_be_trained(self) -> SftRunConfig:
        refuse_float16_training(self.model)
        refuse_adapter_for_model(self.model, self.training.adapter, "training")
        return self

    @model_validator(mode="after")
    def _validation_has_examples(self) -> SftRunConfig:
        if self.training.validate_every and not self.data.held_out:
            raise ValueError(
                f"training.validate_every: got {self.training.validate_every} with data.held_out=0, expected examples "
                "to validate on; set data.held_out, or training.validate_every to 0"
            )
        return self

    @model_validator(mode="after")
    def _micro_batches_hold_an_example(self) -> SftRunConfig:
        what = f"the longest example, data.max_tokens {self.data.max_tokens}"
        refuse_small_budget(self.training, "training", self.data.max_tokens, what)
        return self

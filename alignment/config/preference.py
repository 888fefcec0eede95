"""The stages that learn from preferences: DPO and its kin from pairs, KTO and BCO from labels."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from alignment.config.base import Config, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Share
from alignment.config.data import SourceConfig
from alignment.config.judged_data import LabelsDataConfig, PairsDataConfig
from alignment.config.model import (
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
from alignment.config.reward import RewardExecutionConfig, RewardFunctions
from alignment.config.run import RunConfig
from alignment.preference_terms import SMOOTHED, Kind, Term, refuse_odd_terms, use_reference


class TermConfig(Config):
    """One loss of a sum; docs/preferences.md has the formulae."""

    kind: Kind = "sigmoid"
    """sigmoid (DPO), robust, ipo and hinge compare with a reference; cpo, simpo, orpo and sft have none."""
    weight: PositiveFloat = 1.0
    """Factor in the sum."""
    per_token: bool = False
    """Compare answers by their mean over tokens, of a kind that has a reference. simpo, orpo and sft always do."""

    @model_validator(mode="after")
    def _is_a_term(self) -> TermConfig:
        Term(kind=self.kind, weight=self.weight, per_token=self.per_token)
        return self


DEFAULT_MARGIN = 1.0


class DpoConfig(Config):
    """The loss of pairs."""

    terms: tuple[TermConfig, ...] = Field(default=(TermConfig(),), min_length=1)
    """Losses that are added."""
    beta: PositiveFloat = 0.1
    """How much a log-ratio counts: the higher, the closer the policy stays to the reference."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs whose preference may be the wrong way round; of sigmoid, robust, cpo and simpo."""
    margin: NonNegativeFloat = DEFAULT_MARGIN
    """By how much simpo wants beta times the gap to be positive; of simpo alone."""
    length_alpha: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Weight of an answer's tokens beyond the length of the other (LD-DPO); 1 is DPO."""
    share_prompts: bool = False
    """Compute the prompt of a pair once for both answers, and once what prompts begin with in common."""

    @property
    def uses_reference(self) -> bool:
        return use_reference(self.terms)

    @model_validator(mode="after")
    def _terms_compare(self) -> DpoConfig:
        refuse_odd_terms(self.terms, "dpo.terms")
        kinds = [term.kind for term in self.terms]
        if self.label_smoothing and not set(kinds) & set(SMOOTHED):
            raise ValueError(
                f"dpo.label_smoothing: got {self.label_smoothing:g} with terms {kinds}, expected 0: none of them "
                f"reads it; set it to 0, or use one of {', '.join(SMOOTHED)}"
            )
        if self.margin != DEFAULT_MARGIN and "simpo" not in kinds:
            raise ValueError(
                f"dpo.margin: got {self.margin:g} with terms {kinds}, expected {DEFAULT_MARGIN:g}: simpo alone reads "
                "it; leave it out, or use simpo"
            )
        return self


class KtoConfig(Config):
    """The loss of labels."""

    loss: Literal["kto", "bco"] = "kto"
    """KTO measures against the mean log-ratio of mismatched answers, BCO against the classes' running means."""
    beta: PositiveFloat = 0.1
    """How much a log-ratio counts."""
    desirable_weight: PositiveFloat = 1.0
    """Factor of the losses of desirable answers."""
    undesirable_weight: PositiveFloat = 1.0
    """Factor of the losses of undesirable answers."""
    balance: Literal["warn", "auto"] = "warn"
    """Where classes are out of balance, desirable_weight n_D / (undesirable_weight n_U) outside of 1 to 4/3
    (Ethayarajh 2024): `warn` tells which weights would do, `auto` raises the weight of the class that counts too
    little."""
    share_prompts: bool = False
    """Compute a prompt once for all of its answers, and once what prompts begin with in common."""


class ReferenceConfig(Config):
    """The model that the policy is compared with: the one it starts as."""

    mode: Literal["live", "cached", "none"] = "live"
    """`live` asks it at every step: an adapter's policy with its adapter off, or else a frozen copy. `cached` asks it
    for everything before the first step and keeps the numbers on disk, for later runs too. `none` where no term of
    the loss has one."""
    sync_every: Positive | None = None
    """Steps after which the reference becomes the policy, again and again (TR-DPO, Gorbatovski 2024); None leaves it.
    Only with live."""
    sync_share: Share = 1.0
    """How far it goes there: 1 all the way, less keeps the rest of the old reference, with model.dtype float32 alone.
    With an adapter only 1: a mean of two low-rank updates has a higher rank."""

    @model_validator(mode="after")
    def _only_a_live_one_moves(self) -> ReferenceConfig:
        if self.sync_every is not None and self.mode != "live":
            raise ValueError(
                f"reference.sync_every: got {self.sync_every} with reference.mode={self.mode}, expected live: numbers "
                "on disk are of a model that stays; set mode to live, or remove sync_every"
            )
        return self


class PreferenceStepsConfig(MicroBatchConfig):
    """Optimiser steps on preferences."""

    adapter: AdapterConfig = AdapterConfig()
    """What is trained: every parameter, or one of the methods of docs/peft.md."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=5e-6)
    """Its optimiser."""
    batch_size: Positive = 8
    """Rows per optimiser step: pairs, or labelled answers."""
    micro_batch_size: Positive | None = None
    """Rows per forward on one worker, at most. None is 4, and no bound where max_tokens_per_micro_batch is set."""
    max_tokens_per_micro_batch: Positive | None = None
    """Tokens per forward on one worker, at most: of both answers of a pair, padding included. None does not bound."""

    @model_validator(mode="after")
    def _rate_is_scheduled(self) -> PreferenceStepsConfig:
        refuse_adaptive_rate(self.optimizer, "training.optimizer")
        return self


class PreferenceTrainingConfig(PreferenceStepsConfig):
    """The stage."""

    validate_every: NonNegative = 0
    """Steps between validations on the held-out rows; 0 validates before the first and after the last step."""
    patience: Positive | None = None
    """End the run after so many validations in a row without a better loss; None runs to the end. The step of the best
    validation is what `final` holds."""

    @model_validator(mode="after")
    def _patience_counts(self) -> PreferenceTrainingConfig:
        refuse_idle_patience(self.patience, self.validate_every)
        return self


class AnsweredPromptsConfig(Config):
    """Prompts that are answered before and after, and scored by rules."""

    source: SourceConfig | None = None
    """Rows of prompts; None asks nothing."""
    prompt_key: str = "prompt"
    """Column with the user's text, or with a `messages` list."""
    max_prompt_tokens: Positive = 256
    """A longer prompt is refused."""
    num_prompts: Positive = 64
    """How many, chosen by a hash of the prompt as an online run holds out its own; they are not trained on."""
    functions: RewardFunctions = ()
    """Rules that score the answers, e.g. `numbers:final_number`."""
    max_new_tokens: Positive = 128
    """The longest answer."""
    greedy: bool = False
    """Most likely tokens instead of samples; before and after draw the same random numbers either way."""
    execution: RewardExecutionConfig = RewardExecutionConfig()
    """Where the rules run."""

    @model_validator(mode="after")
    def _answers_are_scored(self) -> AnsweredPromptsConfig:
        if (self.source is None) != (not self.functions):
            raise ValueError(
                f"evaluation: got source {self.source and 'given'} with {len(self.functions)} functions, expected "
                "both or neither: answers are there to be scored; give both, or none"
            )
        return self


class PreferenceRunConfig(Config):
    """What runs from pairs and from labels have in common."""

    run: RunConfig = RunConfig()
    """The run itself; num_steps counts optimiser steps."""
    model: ModelConfig = ModelConfig()
    """What is fine-tuned, and where its reference begins."""
    reference: ReferenceConfig = ReferenceConfig()
    """What the policy is compared with."""
    training: PreferenceTrainingConfig = PreferenceTrainingConfig()
    """The stage."""
    evaluation: AnsweredPromptsConfig = AnsweredPromptsConfig()
    """Answers before and after."""

    @model_validator(mode="after")
    def _model_can_be_trained(self) -> PreferenceRunConfig:
        refuse_float16_training(self.model)
        refuse_adapter_for_model(self.model, self.training.adapter, "training")
        return self

    @model_validator(mode="after")
    def _reference_can_follow(self) -> PreferenceRunConfig:
        reference, adapter = self.reference, self.training.adapter
        if reference.sync_every is None or not adapter.enabled:
            return self
        if reference.sync_share < 1:
            raise ValueError(
                f"reference.sync_share: got {reference.sync_share:g} with an adapter, expected 1: a mean of two "
                "low-rank updates is none of that rank; set it to 1, or train all parameters"
            )
        if adapter.type == "adalora":
            raise ValueError(
                "reference.sync_every: got it with adapter.type=adalora, expected another type: its ranks go on "
                "moving; remove sync_every, or set type to lora"
            )
        return self


class DpoRunConfig(PreferenceRunConfig):
    """Everything of a run on pairs but the machines."""

    data: PairsDataConfig = PairsDataConfig()
    """Pairs of answers."""
    dpo: DpoConfig = DpoConfig()
    """The loss."""

    @model_validator(mode="after")
    def _reference_is_used(self) -> DpoRunConfig:
        kinds = [term.kind for term in self.dpo.terms]
        if self.reference.mode == "none" and self.dpo.uses_reference:
            raise ValueError(f"reference.mode: got none with dpo.terms {kinds}, expected live or cached; set one")
        if self.reference.mode != "none" and not self.dpo.uses_reference:
            raise ValueError(
                f"reference.mode: got {self.reference.mode} with dpo.terms {kinds}, expected none: no term has a use "
                "for it; set it to none"
            )
        return self

    @model_validator(mode="after")
    def _rows_fit(self) -> DpoRunConfig:
        refuse_unchecked_validation(self.data, self.training)
        longest = 2 * self.data.max_tokens
        refuse_small_budget(self.training, "training", longest, f"the longest pair, 2 x {self.data.max_tokens}")
        return self


class KtoRunConfig(PreferenceRunConfig):
    """Everything of a run on labels but the machines."""

    data: LabelsDataConfig = LabelsDataConfig()
    """Labelled answers."""
    kto: KtoConfig = KtoConfig()
    """The loss."""

    @model_validator(mode="after")
    def _answers_meet_other_prompts(self) -> KtoRunConfig:
        if self.reference.mode == "none":
            raise ValueError("reference.mode: got none with labels, expected live or cached; set one of them")
        if self.training.batch_size < 2 and self.kto.loss == "kto":
            raise ValueError(
                f"training.batch_size: got {self.training.batch_size}, expected 2 or more: KTO's baseline is of "
                "answers to each other's prompts; raise it, or set kto.loss to bco"
            )
        return self

    @model_validator(mode="after")
    def _rows_fit(self) -> KtoRunConfig:
        refuse_unchecked_validation(self.data, self.training)
        longest = self.data.max_tokens
        refuse_small_budget(self.training, "training", longest, f"the longest answer, data.max_tokens {longest}")
        return self


def refuse_unchecked_validation(data: PairsDataConfig | LabelsDataConfig, training: PreferenceTrainingConfig) -> None:
    """Validations need rows."""
    if training.validate_every and not data.held_out and not any(task.held_out for task in data.sources):
        raise ValueError(
            f"training.validate_every: got {training.validate_every} with data.held_out=0, expected rows to validate "
            "on; set data.held_out, or training.validate_every to 0"
        )

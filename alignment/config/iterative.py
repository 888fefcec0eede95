"""The stage that learns from pairs of the policy's own answers, in rounds."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from alignment.config.base import Config, NonNegative, Positive
from alignment.config.model import refuse_float16_training, refuse_small_budget, refuse_unmergeable
from alignment.config.preference import DpoConfig, PreferenceStepsConfig
from alignment.config.ranking import RankedRunConfig
from alignment.config.rollout import refuse_adapter_on_other_base
from alignment.config.run import EvaluationConfig, RunConfig


class RoundsConfig(Config):
    """What a round is. A run has run.num_steps / steps_per_round of them."""

    prompts_per_round: Positive = 96
    """Prompts that the policy answers anew."""
    steps_per_round: Positive = 16
    """Optimiser steps on the pairs of these answers."""
    replay_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each step's pairs that comes from earlier rounds; 0 takes none."""
    label_by: Literal["reward", "person"] = "reward"
    """Who says which of two answers is better: the scores, or somebody who is asked about ranking.num_to_label pairs
    of each round; see docs/iterative.md."""
    labels: str | None = None
    """File to which that person's lines go, .jsonl; the same for all rounds. A round without a line there waits."""
    evaluate_every: NonNegative = 0
    """Rounds after which the held-out prompts are answered, beside before the first and after the last; 0 is never."""

    @model_validator(mode="after")
    def _labels_have_a_place(self) -> RoundsConfig:
        if (self.label_by == "person") != (self.labels is not None):
            raise ValueError(
                f"rounds.labels: got {self.labels!r} with rounds.label_by={self.label_by}, expected a file with "
                "person, and none with reward; name one, or set label_by to the other"
            )
        if self.labels is not None and not self.labels.endswith(".jsonl"):
            raise ValueError(
                f"rounds.labels: got {self.labels!r}, expected a name that ends with .jsonl: lines are added to it "
                "round after round; rename it"
            )
        return self


class RoundReferenceConfig(Config):
    """The model that the policy is compared with."""

    follow: Literal["round", "never"] = "round"
    """`round`: the policy as it was when the round began. `never`: as it was when the run began."""


class IterativeRunConfig(RankedRunConfig):
    """Everything of a run in rounds but the machines."""

    run: RunConfig = RunConfig(num_steps=48, checkpoint_every=16)
    """The run itself; num_steps counts optimiser steps of all rounds. The end of a round is always on disk."""
    rounds: RoundsConfig = RoundsConfig()
    """The rounds."""
    dpo: DpoConfig = DpoConfig()
    """The loss of pairs."""
    reference: RoundReferenceConfig = RoundReferenceConfig()
    """What the policy is compared with."""
    training: PreferenceStepsConfig = PreferenceStepsConfig()
    """The steps."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """The held-out table."""

    @property
    def num_rounds(self) -> int:
        return self.run.num_steps // self.rounds.steps_per_round

    @property
    def max_tokens(self) -> int:
        """Of a prompt and an answer that the limit cut, with the end token that it is read with."""
        return self.data.max_prompt_tokens + self.rollout.max_new_tokens + 1

    @property
    def knows_start(self) -> bool:
        """Whether the model that the run began with can still be asked, at no cost in memory."""
        return self.training.adapter.enabled or self.reference.follow == "never"

    @model_validator(mode="after")
    def _rounds_are_whole(self) -> IterativeRunConfig:
        if self.run.num_steps % self.rounds.steps_per_round:
            raise ValueError(
                f"run.num_steps: got {self.run.num_steps}, expected a multiple of rounds.steps_per_round="
                f"{self.rounds.steps_per_round}; choose one"
            )
        return self

    @model_validator(mode="after")
    def _somebody_is_asked(self) -> IterativeRunConfig:
        if (self.rounds.label_by == "person") != (self.ranking.num_to_label > 0):
            raise ValueError(
                f"ranking.num_to_label: got {self.ranking.num_to_label} with rounds.label_by={self.rounds.label_by}, "
                "expected some with person, and 0 with reward; set it, or rounds.label_by"
            )
        return self

    @model_validator(mode="after")
    def _weights_can_be_sent(self) -> IterativeRunConfig:
        refuse_float16_training(self.model)
        why = "the rollout engines are sent merged weights, and virtual tokens and new layers are none"
        refuse_unmergeable(self.training.adapter, "training", why)
        refuse_adapter_on_other_base(self.rollout, self.training.adapter, "training")
        return self

    @model_validator(mode="after")
    def _reference_can_follow(self) -> IterativeRunConfig:
        if self.reference.follow == "never":
            return self
        kinds = [term.kind for term in self.dpo.terms]
        if not self.dpo.uses_reference:
            raise ValueError(
                f"reference.follow: got round with dpo.terms {kinds}, expected never: no term has a use for a "
                "reference; set it to never"
            )
        if self.training.adapter.type == "adalora":
            raise ValueError(
                "reference.follow: got round with adapter.type=adalora, expected another type: its ranks go on "
                "moving; set follow to never, or type to lora"
            )
        return self

    @model_validator(mode="after")
    def _micro_batches_hold_a_pair(self) -> IterativeRunConfig:
        what = f"the longest pair, 2 x {self.max_tokens} (prompt, answer and its end token)"
        refuse_small_budget(self.training, "training", 2 * self.max_tokens, what)
        return self

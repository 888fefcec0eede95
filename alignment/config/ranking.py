"""The stage that turns a policy's own answers into preference data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from alignment.config.base import Config, FiniteFloat, NonNegative, NonNegativeFloat, Positive
from alignment.config.data import PromptDataConfig
from alignment.config.model import ModelConfig
from alignment.config.reward import RewardConfig
from alignment.config.rollout import RolloutConfig

OnCut = Literal["reject", "skip", "keep"]
UnsureBy = Literal["gap", "disagreement"]


class RankRunSectionConfig(Config):
    """One run."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    """Decides what is sampled."""


class PairingConfig(Config):
    """How answers become pairs."""

    num_samples_per_prompt: Annotated[int, Field(ge=2)] = 4
    """Answers per prompt."""
    batch_size: Positive = 16
    """Prompts that are answered and scored in one call: what a kill loses at most."""
    pairs_per_prompt: Positive = 1
    """Pairs of a prompt, at most, those with the largest gap between scores first."""
    min_gap: NonNegativeFloat = 0.0
    """By how much the chosen answer's score is higher, at least; 0 asks for any difference."""
    on_cut: OnCut = "reject"
    """Answers that the limit cut off: `reject` never takes them for chosen (or desirable), `skip` takes them for
    nothing, `keep` takes them as any other. They are scored in any case."""
    num_to_label: NonNegative = 0
    """Pairs for a person to judge, of which the scores are least sure: one of a prompt at most, in to_label.jsonl."""
    unsure_by: UnsureBy = "gap"
    """What tells them: the smallest `gap` between two scores, or the largest `disagreement` of an ensemble on both."""


class RankingConfig(PairingConfig):
    """How answers become pairs and labels."""

    label_threshold: FiniteFloat = 0.5
    """Score from which an answer is desirable."""


class RankedRunConfig(Config):
    """What runs that rank a policy's answers have in common."""

    data: PromptDataConfig = PromptDataConfig()
    """Prompts. Those held out are ranked by no run."""
    model: ModelConfig = ModelConfig()
    """The policy that answers."""
    rollout: RolloutConfig = RolloutConfig()
    """Sampling."""
    reward: RewardConfig
    """Scores."""
    ranking: PairingConfig = PairingConfig()
    """Pairs."""

    @model_validator(mode="after")
    def _scores_stand_alone(self) -> RankedRunConfig:
        scaled = ["reward.normalize"] * self.reward.normalize
        scaled += [f"reward.functions, {name}: normalize" for name in self.reward.normalized]
        if scaled:
            raise ValueError(
                f"{scaled[0]}: got true in a ranking, expected false: running statistics would score an answer by the "
                "batch that it came in; set it to false"
            )
        return self

    @model_validator(mode="after")
    def _answers_differ(self) -> RankedRunConfig:
        most = self.ranking.num_samples_per_prompt * (self.ranking.num_samples_per_prompt - 1) // 2
        if self.ranking.pairs_per_prompt > most:
            raise ValueError(
                f"ranking.pairs_per_prompt: got {self.ranking.pairs_per_prompt}, expected at most the {most} pairs of "
                f"{self.ranking.num_samples_per_prompt} answers; lower it, or raise ranking.num_samples_per_prompt"
            )
        return self

    @model_validator(mode="after")
    def _somebody_disagrees(self) -> RankedRunConfig:
        if self.ranking.unsure_by == "disagreement" and not self.reward.ensemble.models:
            raise ValueError(
                "ranking.unsure_by: got disagreement with one reward model at most, expected several; name more in "
                "reward.ensemble.models, or set it to gap"
            )
        return self

    @model_validator(mode="after")
    def _penalty_has_a_start(self) -> RankedRunConfig:
        self.reward.refuse_long_buffer(self.rollout.max_new_tokens)
        return self


class RankRunConfig(RankedRunConfig):
    """Everything of a ranking run but the machines."""

    run: RankRunSectionConfig = RankRunSectionConfig()
    """The run itself."""
    ranking: RankingConfig = RankingConfig()
    """Pairs and labels."""

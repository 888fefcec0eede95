"""What scores an answer."""

from __future__ import annotations

from typing import ClassVar

from pydantic import field_validator, model_validator

from alignment.config.base import Config, FiniteFloat, Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat
from alignment.config.model import MicroBatchConfig


class RewardFunctionConfig(Config):
    """One rule reward."""

    name: str
    """`module:function` below the rewards package, e.g. `text:finished_sentence`."""
    weight: FiniteFloat = 1.0
    """Factor in the total."""


class RewardConfig(MicroBatchConfig):
    """What scores an answer: a reward model, rule functions, or both, added with weights."""

    default_rows: ClassVar[int] = 8

    model: str | None = None
    """Folder or hub name of a sequence-classification model with one label; None uses functions alone."""
    revision: str | None = None
    """Commit hash of a hub model; None takes model.revision where this is the same repository."""
    model_weight: FiniteFloat = 1.0
    """Factor of the reward model's score."""
    standardize_model: bool = True
    """Subtract the mean and divide by the standard deviation saved with the reward model, where it has them."""
    functions: tuple[RewardFunctionConfig, ...] = ()
    """Rule rewards."""
    micro_batch_size: Positive | None = None
    """Sequences per forward on one worker, at most. None is 8, and no bound beside max_tokens_per_micro_batch."""
    max_tokens_per_micro_batch: Positive | None = None
    """Tokens per forward on one worker, at most: all that it computes, padding included; a longer sequence, by the
    reward model's own tokenizer, is a forward of its own. None does not bound."""
    clip: PositiveFloat | None = None
    """Scores are cut to [-clip, clip]."""
    normalize: bool = False
    """Divide by the running standard deviation of scores, the mean subtracted."""
    missing_eos_penalty: NonNegativeFloat = 0.0
    """Subtracted from answers that the limit cut off."""
    overlong_buffer: NonNegative = 0
    """Last tokens before rollout.max_new_tokens over which a penalty grows from 0 to overlong_penalty; 0 is off."""
    overlong_penalty: NonNegativeFloat = 1.0
    """Full overlong penalty."""
    max_unscorable: Fraction = 0.0
    """Share of a batch that may come back unscored before the run stops."""

    @field_validator("functions")
    @classmethod
    def _each_function_once(cls, functions: tuple[RewardFunctionConfig, ...]) -> tuple[RewardFunctionConfig, ...]:
        names = [function.name for function in functions]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"got {', '.join(twice)} more than once, expected each function once; add the weights up")
        return functions

    @model_validator(mode="after")
    def _something_scores(self) -> RewardConfig:
        if self.model is None and not self.functions:
            raise ValueError("got no reward.model and no reward.functions, expected at least one; name one")
        return self

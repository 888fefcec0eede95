"""What scores an answer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, JsonValue, field_validator, model_validator

from alignment.config.base import Config, FiniteFloat, Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat
from alignment.config.model import MicroBatchConfig
from alignment.ensembles import Combination

MODEL_PART = "reward_model"
"""The part that the reward model gives."""
GOLD = "gold/"
"""What the names of the parts begin with that are measured and never trained on."""
PART = re.compile(r"\w[\w.:-]*(/\w[\w.:-]*)*")
"""A part's name stands in the names of metrics."""
TAKEN = frozenset(
    {"mean", "clipped_share", "disagreement", "unscored", "gold_unscored", "unscorable_count", "shaped_score"}
)
"""Metrics `reward/NAME` of the run itself, which no part's may be taken for."""
LEAST_MEMORY_MB = 64
"""Functions of the package start in 20 to 30; the rest is what they work with."""


class FunctionConfig(Config):
    """A function that scores answers, and how it is called."""

    name: str
    """`module:function` below the rewards package, e.g. `text:finished_sentence`."""
    part: str | None = None
    """What its numbers are called; None takes the name. So one function can count twice, with other settings."""
    settings: dict[str, JsonValue] = {}
    """Arguments of the function by name, e.g. `{min_words: 10}`; what is not named keeps its default."""
    time_limit: PositiveFloat | None = None
    """Seconds for one call; None takes reward.execution.time_limit."""
    samples_per_call: Positive | None = None
    """Answers per call; None takes reward.execution.samples_per_call."""

    @field_validator("part")
    @classmethod
    def _is_a_name_of_metrics(cls, part: str | None) -> str | None:
        if part is not None and (not PART.fullmatch(part) or part.partition("/")[0] in TAKEN):
            raise ValueError(
                f"got {part!r}, expected letters, digits, _, ., : and -, with / between such words, and none that "
                f"begins with {', '.join(sorted(TAKEN))}, as metrics of the run do; rename it"
            )
        return part

    @property
    def key(self) -> str:
        """What its part is called."""
        return self.part if self.part is not None else self.name


class GoldFunctionConfig(FunctionConfig):
    """A rule that answers are measured by and never trained on."""

    @property
    def key(self) -> str:
        return GOLD + super().key

    @model_validator(mode="before")
    @classmethod
    def _has_no_say(cls, given: Any) -> Any:
        trains = set(RewardFunctionConfig.model_fields) - set(cls.model_fields)
        if isinstance(given, Mapping) and (found := sorted(trains & set(given))):
            raise ValueError(
                f"{found[0]}: got {given[found[0]]!r}, expected no {', '.join(sorted(trains))}: gold functions are "
                "held out of the total, which alone is trained on; remove it, or move the function to reward.functions"
            )
        return given


class RewardFunctionConfig(FunctionConfig):
    """One rule reward."""

    weight: FiniteFloat = 1.0
    """Factor in the total."""
    clip: tuple[FiniteFloat, FiniteFloat] | None = None
    """Its numbers are cut to [low, high] before they are weighted."""
    normalize: bool = False
    """Subtract the running mean of its numbers and divide by their running standard deviation, before `clip`. While
    training only: held-out scores stay comparable."""
    gate: bool = False
    """No reward unless it is above 0: an answer that fails it is worth its own weighted number and nothing else."""

    @field_validator("clip")
    @classmethod
    def _limits_leave_room(cls, clip: tuple[float, float] | None) -> tuple[float, float] | None:
        if clip is not None and clip[0] >= clip[1]:
            raise ValueError(f"got {list(clip)}, expected [low, high] with low below high; widen the limits")
        return clip

    @model_validator(mode="after")
    def _gate_reads_its_own_numbers(self) -> RewardFunctionConfig:
        if self.gate and self.normalize:
            raise ValueError(
                f"{self.key}, gate: got normalize: true, expected a gate that reads its own numbers: it is open above "
                "0, and normalised numbers are above and below 0 whatever they say; set one of the two to false"
            )
        return self


class RewardExecutionConfig(Config):
    """Where reward functions run: processes that are ended when they do not answer."""

    num_workers: Positive = 1
    """Processes per reward actor. The scores do not depend on it."""
    time_limit: PositiveFloat = 10.0
    """Seconds for one call."""
    samples_per_call: Positive = 32
    """Answers per call, at most. A call that fails is made again for each answer alone."""
    memory_mb: Positive = 8192
    """Address space of a process, in MB."""

    @field_validator("memory_mb")
    @classmethod
    def _a_process_can_start(cls, memory_mb: int) -> int:
        if memory_mb < LEAST_MEMORY_MB:
            raise ValueError(
                f"got {memory_mb}, expected at least {LEAST_MEMORY_MB}: a process does not start in less; raise it"
            )
        return memory_mb


class EnsembleConfig(Config):
    """Further reward models, whose scores and reward.model's become one."""

    models: tuple[str, ...] = ()
    """Folders or hub names; each has its own tokenizer, and its own statistics to standardise with."""
    how: Combination = "mean"
    """`mean`, `min`, or `mean_minus_std`: the mean minus std_coef times their standard deviation."""
    std_coef: NonNegativeFloat = 1.0
    """Read by mean_minus_std."""


def _each_function_once(functions: tuple[RewardFunctionConfig, ...]) -> tuple[RewardFunctionConfig, ...]:
    keys = [function.key for function in functions]
    if reserved := [key for key in keys if key.startswith(GOLD)]:
        raise ValueError(
            f"got a part {reserved[0]!r}, expected a name that does not begin with {GOLD!r}, as those of "
            "reward.gold do; rename it"
        )
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(
            f"got {', '.join(twice)} more than once, expected each part once; add the weights up, or give the "
            "second another name with part:"
        )
    if taken := [key for key in keys if key.partition("/")[0] == MODEL_PART]:
        raise ValueError(f"got a part {taken[0]!r}, expected another name: it is the reward model's; rename it")
    return functions


RewardFunctions = Annotated[tuple[RewardFunctionConfig, ...], AfterValidator(_each_function_once)]
"""Rules that score together, each part of its own name."""


class RewardConfig(MicroBatchConfig):
    """What scores an answer: a reward model, rule functions, or both, added with weights."""

    default_rows: ClassVar[int] = 8

    model: str | None = None
    """Folder or hub name of a sequence-classification model with one label; None uses functions alone."""
    revision: str | None = None
    """Commit hash of a hub model; None takes model.revision where this is the same repository."""
    ensemble: EnsembleConfig = EnsembleConfig()
    """Further reward models."""
    model_weight: FiniteFloat = 1.0
    """Factor of the reward model's score."""
    standardize_model: bool = True
    """Subtract the mean and divide by the standard deviation saved with the reward model, where it has them."""
    functions: RewardFunctions = ()
    """Rule rewards."""
    gold: tuple[GoldFunctionConfig, ...] = ()
    """Rules held out of training: they measure every answer, as parts `gold/NAME`, and have no say in the total."""
    execution: RewardExecutionConfig = RewardExecutionConfig()
    """How they are run."""
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

    @field_validator("gold")
    @classmethod
    def _each_gold_function_once(cls, gold: tuple[GoldFunctionConfig, ...]) -> tuple[GoldFunctionConfig, ...]:
        keys = [function.key for function in gold]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ValueError(
                f"got {', '.join(twice)} more than once, expected each part once; remove one, or give the second "
                "another name with part:"
            )
        return gold

    @model_validator(mode="after")
    def _something_scores(self) -> RewardConfig:
        if self.model is None and not self.functions:
            raise ValueError("got no reward.model and no reward.functions, expected at least one; name one")
        if self.model is None and self.ensemble.models:
            raise ValueError("got reward.ensemble.models without reward.model, expected the first one there; move it")
        return self

    def refuse_long_buffer(self, max_new_tokens: int) -> None:
        """Refuse an overlong penalty that every answer pays.

        Raises:
            ValueError: it begins before the first token.
        """
        if self.overlong_buffer > max_new_tokens:
            raise ValueError(
                f"reward.overlong_buffer: got {self.overlong_buffer}, expected at most the {max_new_tokens} of "
                "rollout.max_new_tokens, or every answer pays; lower it"
            )

    @property
    def models(self) -> tuple[str, ...]:
        """All reward models; the first is `model`."""
        return () if self.model is None else (self.model, *self.ensemble.models)

    @property
    def weights(self) -> Mapping[str, float]:
        """Factor of every part of the total."""
        model = {MODEL_PART: self.model_weight} if self.model is not None else {}
        return {**model, **{function.key: function.weight for function in self.functions}}

    @property
    def clips(self) -> Mapping[str, tuple[float, float]]:
        """Limits of the parts that have some."""
        return {function.key: function.clip for function in self.functions if function.clip is not None}

    @property
    def gates(self) -> frozenset[str]:
        """Parts without which there is no reward."""
        return frozenset(function.key for function in self.functions if function.gate)

    @property
    def normalized(self) -> tuple[str, ...]:
        """Parts with running statistics."""
        return tuple(function.key for function in self.functions if function.normalize)

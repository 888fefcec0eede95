"""What scores an answer: the reward model and the rule functions, weighted and added, every part kept."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from actors.loading import scalar_model, split_frozen
from actors.worker import WHOLE, Actor
from alignment import models
from alignment.config import ModelConfig, RewardConfig
from alignment.config.cluster import RoleConfig
from alignment.data.chat import encode_conversation, eos_ids_of_model, load_tokenizer
from alignment.learners.reward_model import score_sequences
from alignment.types import Rollout, Score
from rewards.base import RewardFunction, combine, load_function, refuse_reserved

STATISTICS_FILE = "score_statistics.json"


class RewardModelActor(Actor):
    """Scores rollouts. Text goes in: the reward model may have another tokenizer and template than the policy."""

    role = "reward_model"

    def __init__(
        self, *, model: ModelConfig, reward: RewardConfig, device: str = "cpu", machines: RoleConfig = WHOLE
    ) -> None:
        self.model_config, self.config, self.device, self.machines = model, reward, device, machines

    def setup(self, peers: Mapping[str, Actor]) -> None:
        self.functions: dict[str, RewardFunction] = {f.name: load_function(f.name) for f in self.config.functions}
        self.weights = {f.name: f.weight for f in self.config.functions}
        self.mean, self.std = 0.0, 1.0
        self.model: models.HfModel | None = None
        if self.config.model is None:
            return
        self.weights["reward_model"] = self.config.model_weight
        own = self.model_config.at(self.config.model, self.config.revision)
        self.tokenizer = load_tokenizer(own.path, own.revision)
        self.eos_ids = eos_ids_of_model(self.tokenizer, own.path, own.revision)
        model = scalar_model(own.path, own, self.device, head="require", frozen=True)
        self.model = split_frozen(model, self.lockstep)
        self.num_positions = models.num_positions(self.model.model.config)
        if self.config.standardize_model:
            self.mean, self.std = load_statistics(Path(self.config.model))

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """One `Score` per rollout, in order."""
        if not rollouts:  # of a model that is split over several processes, this one has nothing to score
            if self.model is not None:
                self._model_scores(rollouts)
            return []
        responses = [rollout.response for rollout in rollouts]
        prompts = [rollout.prompt.messages[-1]["content"] for rollout in rollouts]
        columns = _columns(rollouts) if self.functions else {}
        parts: dict[str, list[float | None]] = {}
        if self.model is not None:
            parts["reward_model"] = self._model_scores(rollouts)
        for name, function in self.functions.items():
            parts[name] = function(prompts, responses, **columns)
        totals, breakdowns = combine(parts, self.weights, num_responses=len(rollouts))
        return [Score(total=total, parts=breakdown) for total, breakdown in zip(totals, breakdowns, strict=True)]

    def _model_scores(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """The answer is read as a finished turn, end token included, exactly as the training pairs were.

        Whether it really finished is the missing-EOS penalty's business. None for a text that its own tokenizer makes
        longer than the model's positions.
        """
        assert self.model is not None
        sequences = [
            encode_conversation(
                self.tokenizer,
                [*rollout.prompt.messages, {"role": "assistant", "content": rollout.response}],
                eos_ids=self.eos_ids,
            )[0]
            for rollout in rollouts
        ]
        fits = [self.num_positions is None or len(sequence) <= self.num_positions for sequence in sequences]
        scores = iter(
            score_sequences(
                self.model,
                [sequence for sequence, fit in zip(sequences, fits, strict=True) if fit],
                limit=self.config.micro_batch_limit(self.model.layout),
                device=self.device,
                lockstep=self.lockstep,
            )
        )
        return [(next(scores) - self.mean) / self.std if fit else None for fit in fits]


def load_statistics(folder: Path) -> tuple[float, float]:
    """Mean and standard deviation of the scores of real answers; 0 and 1 for a model that came without them.

    Raises:
        ValueError: a file that is broken, or numbers that nothing can be standardised with.
    """
    file = folder / STATISTICS_FILE
    if not file.is_file():
        return 0.0, 1.0
    remedy = "train the reward model again, or set reward.standardize_model to false"
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        mean, std = float(saved["mean"]), float(saved["std"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: got a broken file ({type(error).__name__}: {error}), expected JSON with mean and std; {remedy}"
        ) from error
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise ValueError(
            f"{file}: got mean {mean:g} and std {std:g}, expected finite numbers and a std above 0; {remedy}"
        )
    return mean, std


def _columns(rollouts: Sequence[Rollout]) -> dict[str, list[object]]:
    """Extra data columns as lists, plus what the sampler knows: `finish_reasons` and `lengths`."""
    names = dict.fromkeys(name for rollout in rollouts for name in rollout.prompt.columns)
    refuse_reserved(names)
    columns: dict[str, list[object]] = {name: [r.prompt.columns.get(name) for r in rollouts] for name in names}
    columns["finish_reasons"] = [rollout.finish_reason for rollout in rollouts]
    columns["lengths"] = [len(rollout.response_ids) for rollout in rollouts]
    return columns

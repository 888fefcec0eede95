"""What scores an answer: the reward model and the rule functions, weighted and added, every part kept.

Gold functions are asked with them, and their numbers kept beside the total.
"""

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
from alignment.config.reward import MODEL_PART
from alignment.data.chat import encode_conversation, eos_ids_of_model, load_tokenizer
from alignment.learners.reward_model import score_sequences
from alignment.scores import combine
from alignment.types import Rollout, Score
from rewards.base import check_settings, load_function, refuse_reserved
from rewards.pool import Part, PoolFunction, RewardPool

STATISTICS_FILE = "score_statistics.json"
TOO_LONG = "length: longer than the reward model's positions"


class RewardModelActor(Actor):
    """Scores rollouts. Text goes in: the reward model may have another tokenizer and template than the policy."""

    role = "reward_model"
    pool: RewardPool | None = None

    def __init__(
        self, *, model: ModelConfig, reward: RewardConfig, device: str = "cpu", machines: RoleConfig = WHOLE
    ) -> None:
        self.model_config, self.config, self.device, self.machines = model, reward, device, machines

    def setup(self, peers: Mapping[str, Actor]) -> None:
        self.pool = self._start_pool() if self.config.functions or self.config.gold else None
        self.mean, self.std = 0.0, 1.0
        self.model: models.HfModel | None = None
        if self.config.model is None:
            return
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
        # The functions are at work while the model is.
        scoring = self.pool.score(prompts, responses, _columns(rollouts)) if self.pool is not None else None
        said: dict[str, Part] = {}
        if self.model is not None:
            numbers = self._model_scores(rollouts)
            said[MODEL_PART] = Part(numbers, {i: TOO_LONG for i, number in enumerate(numbers) if number is None})
        if scoring is not None:
            said |= scoring.result()
        gold = {one.key: said[one.key].numbers for one in self.config.gold}
        totals, breakdowns = combine(
            {name: part.numbers for name, part in said.items() if name not in gold},
            self.config.weights,
            clips=self.config.clips,
            gates=self.config.gates,
            num_responses=len(rollouts),
        )
        return [
            Score(
                total=total,
                parts={**breakdown, **{name: numbers[i] for name, numbers in gold.items()}},
                failures={name: part.failures[i] for name, part in said.items() if i in part.failures},
            )
            for i, (total, breakdown) in enumerate(zip(totals, breakdowns, strict=True))
        ]

    def close(self) -> None:
        if self.pool is not None:
            self.pool.close()
            self.pool = None

    def _start_pool(self) -> RewardPool:
        """The processes that the rule functions run in, ready to be asked."""
        execution, functions = self.config.execution, {}
        for one in (*self.config.functions, *self.config.gold):
            check_settings(one.name, load_function(one.name), one.settings)
            functions[one.key] = PoolFunction(
                name=one.name,
                settings=one.settings,
                time_limit=one.time_limit or execution.time_limit,
                samples_per_call=one.samples_per_call or execution.samples_per_call,
            )
        pool = RewardPool(functions, num_workers=execution.num_workers, memory_mb=execution.memory_mb)
        pool.start()
        return pool

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

"""What scores an answer: the reward model and the rule functions, weighted and added, every part kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from actors.loading import scalar_model
from actors.worker import Actor
from alignment import models
from alignment.config import ModelConfig, RewardConfig
from alignment.data.chat import encode_conversation, eos_ids_of_model, load_tokenizer
from alignment.learners.reward_model import score_sequences
from alignment.types import Rollout, Score
from rewards.base import RewardFunction, combine, load_function

STATISTICS_FILE = "score_statistics.json"


class RewardModelActor(Actor):
    """Scores rollouts. Text goes in: the reward model may have another tokenizer and template than the policy."""

    role = "reward_model"

    def __init__(self, *, model: ModelConfig, reward: RewardConfig, device: str = "cpu") -> None:
        self.model_config, self.config, self.device = model, reward, device

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
        self.model = scalar_model(own.path, own, self.device, head="require", frozen=True)
        statistics = Path(self.config.model) / STATISTICS_FILE
        if self.config.standardize_model and statistics.is_file():
            saved = json.loads(statistics.read_text(encoding="utf-8"))
            self.mean, self.std = saved["mean"], saved["std"]

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """One `Score` per rollout, in order."""
        responses = [rollout.response for rollout in rollouts]
        prompts = [rollout.prompt.messages[-1]["content"] for rollout in rollouts]
        columns = _columns(rollouts)
        parts: dict[str, list[float | None]] = {}
        if self.model is not None:
            parts["reward_model"] = self._model_scores(rollouts)
        for name, function in self.functions.items():
            parts[name] = function(prompts, responses, **columns)
        totals, breakdowns = combine(parts, self.weights, num_responses=len(rollouts))
        return [Score(total=total, parts=breakdown) for total, breakdown in zip(totals, breakdowns, strict=True)]

    def _model_scores(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """The answer is read as a finished turn, end token included, exactly as the training pairs were.

        Whether it really finished is the missing-EOS penalty's business.
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
        scores = score_sequences(
            self.model, sequences, micro_batch_size=self.config.micro_batch_size, device=self.device
        )
        return [(score - self.mean) / self.std for score in scores]


def _columns(rollouts: Sequence[Rollout]) -> dict[str, list[object]]:
    """Extra data columns as lists, plus what the sampler knows: `finish_reasons` and `lengths`."""
    names = dict.fromkeys(name for rollout in rollouts for name in rollout.prompt.columns)
    columns: dict[str, list[object]] = {name: [r.prompt.columns.get(name) for r in rollouts] for name in names}
    columns["finish_reasons"] = [rollout.finish_reason for rollout in rollouts]
    columns["lengths"] = [len(rollout.response_ids) for rollout in rollouts]
    return columns

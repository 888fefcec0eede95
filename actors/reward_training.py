"""The reward model while it learns; `actors.reward` hosts the finished one."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from actors.hosted_model import STATISTICS_FILE
from actors.learning import LearningActor
from actors.loading import scalar_model
from alignment import adapters
from alignment.adapters import TrainingMethod
from alignment.config import RewardModelTrainingConfig
from alignment.data.chat import load_tokenizer
from alignment.engines.base import Engine
from alignment.judgements import Judgement
from alignment.learners.reward_model import RewardModelLearner
from alignment.models import HfModel
from alignment.reward_objectives import Objectives


class RewardTrainingActor(LearningActor):
    """Trains a scalar head on a backbone, full or LoRA."""

    role = "reward_model"
    learner: RewardModelLearner
    training: RewardModelTrainingConfig

    def load_model(self) -> HfModel:
        return scalar_model(
            self.model_path,
            self.model_config,
            self.device,
            head="random",
            seed=self.seed,
            quantization=self.training.adapter.quantization,
        )

    def make_learner(self, engine: Engine, method: TrainingMethod | None) -> RewardModelLearner:
        return RewardModelLearner(
            self.model,
            engine,
            micro_batch_limit=self.training.micro_batch_limit(self.model.layout),
            objectives=objectives_of(self.training),
            device=self.device,
            method=method,
        )

    def update(self, records: Sequence[Judgement], *, step: int) -> dict[str, float]:
        return self._once(step, lambda: self.learner.update(records, step=step))

    def scores(self, records: Sequence[Judgement]) -> list[tuple[float, ...]]:
        """Of each record the scores of its answers, or of its steps."""
        return self.learner.scores(records)

    def export(self, folder: Path) -> None:
        """A sequence-classification folder, adapters merged, that `RewardModelActor` (or transformers) loads."""
        write = self.ranks.rank == 0
        tokenizer = load_tokenizer(self.model_path, self.model_config.revision)
        adapters.export_merged(self.model.model, folder, tokenizer, write=write)


def objectives_of(training: RewardModelTrainingConfig) -> Objectives:
    return Objectives(
        center_coef=training.center_coef,
        ranking=training.ranking_loss,
        rating=training.rating_loss,
        weigh_agreement=training.weigh_agreement,
    )


def write_statistics(folder: Path, scores: Sequence[float]) -> dict[str, float]:
    """Mean and standard deviation of the scores of real answers: a hosted model reports multiples of it."""
    saved = {"mean": statistics.fmean(scores), "std": statistics.pstdev(scores), "count": len(scores)}
    (folder / STATISTICS_FILE).write_text(json.dumps(saved), encoding="utf-8")
    return saved

"""The reward model while it learns; `actors.reward` hosts the finished one."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from actors.hosted_model import STATISTICS_FILE
from actors.loading import load_trained, make_trainable, save_trained, scalar_model
from actors.worker import WHOLE, Actor, UpdateOnce
from alignment import adapters
from alignment.config import ModelConfig, RewardModelTrainingConfig
from alignment.config.cluster import RoleConfig
from alignment.data.chat import load_tokenizer
from alignment.judgements import Judgement
from alignment.learners.reward_model import RewardModelLearner
from alignment.reward_objectives import Objectives


class RewardTrainingActor(Actor):
    """Trains a scalar head on a backbone, full or LoRA."""

    role = "reward_model"
    learns = True

    def __init__(
        self,
        *,
        model_path: str,
        model: ModelConfig,
        training: RewardModelTrainingConfig,
        total_updates: int,
        seed: int,
        device: str = "cpu",
        machines: RoleConfig = WHOLE,
    ) -> None:
        self.model_path, self.model_config, self.config = model_path, model, training
        self.total_updates, self.seed, self.device = total_updates, seed, device
        self.machines = machines
        self._once = UpdateOnce()

    def setup(self, peers: Mapping[str, Actor]) -> None:
        self.model = scalar_model(
            self.model_path,
            self.model_config,
            self.device,
            head="random",
            seed=self.seed,
            quantization=self.config.adapter.quantization,
        )
        engine, method = make_trainable(
            self.model,
            self.model_config,
            self.config,
            total_updates=self.total_updates,
            seed=self.seed,
            ranks=self.ranks,
            machines=self.machines,
            device=self.device,
        )
        self.learner = RewardModelLearner(
            self.model,
            engine,
            micro_batch_limit=self.config.micro_batch_limit(self.model.layout),
            objectives=objectives_of(self.config),
            device=self.device,
            method=method,
        )

    def update(self, records: Sequence[Judgement], *, step: int) -> dict[str, float]:
        return self._once(step, lambda: self.learner.update(records, step=step))

    def scores(self, records: Sequence[Judgement]) -> list[tuple[float, ...]]:
        """Of each record the scores of its answers, or of its steps."""
        return self.learner.scores(records)

    def save(self, folder: Path) -> None:
        save_trained(self.model, self.learner, folder, self.model_path)

    def load(self, folder: Path) -> None:
        load_trained(self.model, self.learner, folder)

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

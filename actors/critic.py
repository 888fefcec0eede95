"""The value model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from actors.learning import LearningActor
from actors.loading import scalar_model
from alignment.adapters import TrainingMethod
from alignment.config import CriticConfig, PpoConfig
from alignment.engines.base import Engine
from alignment.learners.ppo import CriticLearner
from alignment.models import HfModel
from alignment.types import Experience, Rollout


class CriticActor(LearningActor):
    """Holds the critic, its optimiser and the value update."""

    role = "critic"
    learner: CriticLearner
    training: CriticConfig

    def __init__(self, *, critic: CriticConfig, ppo: PpoConfig, **settings: Any) -> None:
        """`settings`: of `LearningActor`, but for `training`, which is `critic` here."""
        super().__init__(training=critic, **settings)
        self.ppo = ppo

    def load_model(self) -> HfModel:
        quantization = self.training.adapter.quantization
        return scalar_model(self.model_path, self.model_config, self.device, head="zeros", quantization=quantization)

    def make_learner(self, engine: Engine, method: TrainingMethod | None) -> CriticLearner:
        return CriticLearner(
            self.model,
            engine,
            minibatch_size=self.ppo.minibatch_size,
            micro_batch_limit=self.training.micro_batch_limit(self.model.layout),
            ppo_epochs=self.ppo.ppo_epochs,
            value_clip=self.ppo.value_clip,
            vf_coef=self.ppo.vf_coef,
            seed=self.seed,
            device=self.device,
            method=method,
        )

    def values(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        """Per rollout (R_i,) float32."""
        return self.learner.values(rollouts)

    def update(self, experience: Experience, *, step: int) -> dict[str, float]:
        return self._once(step, lambda: self.learner.update(experience, step=step))

    def fit(
        self,
        rollouts: Sequence[Rollout],
        rewards: Sequence[Tensor],
        *,
        step: int,
        gamma: float,
        gae_lambda: float,
    ) -> tuple[list[Tensor], dict[str, float]]:
        """Values from before the update, and the update, in one pass."""
        return self._once(step, lambda: self.learner.fit(rollouts, rewards, gamma=gamma, gae_lambda=gae_lambda))

"""The model that learns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from actors.fine_tuned import FineTunedActor
from alignment.adapters import TrainingMethod
from alignment.config import CorrectionConfig, OptimizerConfig, PolicyConfig, PpoConfig
from alignment.engines.base import Engine
from alignment.learners.ppo import PolicyLearner
from alignment.schedules import KlAdaptiveRate
from alignment.types import Experience, Rollout


def adaptive_rate(optimizer: OptimizerConfig) -> KlAdaptiveRate | None:
    """The controller that the optimiser's config asks for, if any."""
    target = optimizer.adaptive_kl_target
    return None if target is None else KlAdaptiveRate(target, optimizer.adaptive_bounds)


def correction_settings(correction: CorrectionConfig | None) -> dict[str, Any] | None:
    """What `correction_weights` takes, where the config asks for weights."""
    return None if correction is None or correction.kind == "none" else correction.model_dump()


class PolicyActor(FineTunedActor):
    """Holds the policy, its optimiser and the PPO update."""

    learner: PolicyLearner
    training: PolicyConfig

    def __init__(
        self,
        *,
        policy: PolicyConfig,
        ppo: PpoConfig,
        temperature: float,
        correction: CorrectionConfig | None = None,
        logprob_gap_limit: float = math.inf,
        **settings: Any,
    ) -> None:
        """`settings`: of `LearningActor`, but for `training`, which is `policy` here."""
        super().__init__(training=policy, **settings)
        self.ppo, self.temperature = ppo, temperature
        self.correction, self.logprob_gap_limit = correction, logprob_gap_limit

    def make_learner(self, engine: Engine, method: TrainingMethod | None) -> PolicyLearner:
        return PolicyLearner(
            self.model,
            engine,
            temperature=self.temperature,
            minibatch_size=self.ppo.minibatch_size,
            micro_batch_limit=self.training.micro_batch_limit(self.model.layout),
            ppo_epochs=self.ppo.ppo_epochs,
            clip_ratio=self.ppo.clip_ratio,
            clip_ratio_high=self.ppo.clip_ratio_high,
            dual_clip=self.ppo.dual_clip,
            entropy_coef=self.ppo.entropy_coef,
            kl_stop=self.ppo.kl_stop,
            adaptive_rate=adaptive_rate(self.training.optimizer),
            correction=correction_settings(self.correction),
            logprob_gap_limit=self.logprob_gap_limit,
            seed=self.seed,
            device=self.device,
            method=method,
        )

    def logprobs(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        """Per rollout (R_i,) float32."""
        return self.learner.logprobs(rollouts)

    def update(self, experience: Experience, *, step: int) -> dict[str, float]:
        return self._once(step, lambda: self.learner.update(experience, step=step))

    def update_on_policy(self, experience: Experience, *, step: int) -> dict[str, float]:
        return self._once(step, lambda: self.learner.update_on_policy(experience, step=step))

    def check(self, experience: Experience) -> dict[str, float]:
        return self.learner.check(experience)

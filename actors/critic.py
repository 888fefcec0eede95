"""The value model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from actors.loading import load_trained, make_trainable, save_trained, scalar_model, tokenizer_of_text
from actors.worker import WHOLE, Actor, UpdateOnce
from alignment.config import CriticConfig, ModelConfig, PpoConfig
from alignment.config.cluster import RoleConfig
from alignment.learners.ppo import CriticLearner
from alignment.types import Experience, Rollout


class CriticActor(Actor):
    """Holds the critic, its optimiser and the value update."""

    role = "critic"
    learns = True

    def __init__(
        self,
        *,
        model_path: str,
        model: ModelConfig,
        critic: CriticConfig,
        ppo: PpoConfig,
        total_updates: int,
        seed: int,
        device: str = "cpu",
        machines: RoleConfig = WHOLE,
    ) -> None:
        self.model_path, self.model_config, self.config, self.ppo = model_path, model, critic, ppo
        self.total_updates, self.seed, self.device = total_updates, seed, device
        self.machines = machines
        self._once = UpdateOnce()

    def setup(self, peers: Mapping[str, Actor]) -> None:
        self.model = scalar_model(
            self.model_path,
            self.model_config,
            self.device,
            head="zeros",
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
            tokenizer=tokenizer_of_text(self.config.adapter, self.model_path, self.model_config.revision),
        )
        self.learner = CriticLearner(
            self.model,
            engine,
            minibatch_size=self.ppo.minibatch_size,
            micro_batch_limit=self.config.micro_batch_limit(self.model.layout),
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

    def save(self, folder: Path) -> None:
        save_trained(self.model, self.learner, folder, self.model_path)

    def load(self, folder: Path) -> None:
        load_trained(self.model, self.learner, folder)

"""The model that learns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from actors.loading import causal_model, load_trained, make_trainable, save_trained
from actors.sending import SendingActor
from actors.worker import WHOLE, Actor, UpdateOnce
from alignment import adapters
from alignment.config import CorrectionConfig, ModelConfig, OptimizerConfig, PolicyConfig, PpoConfig
from alignment.config.cluster import RoleConfig
from alignment.data.chat import load_tokenizer
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


class PolicyActor(SendingActor):
    """Holds the policy, its optimiser and the PPO update."""

    role = "policy"
    learns = True

    def __init__(
        self,
        *,
        model_path: str,
        model: ModelConfig,
        policy: PolicyConfig,
        ppo: PpoConfig,
        temperature: float,
        total_updates: int,
        seed: int,
        device: str = "cpu",
        machines: RoleConfig = WHOLE,
        correction: CorrectionConfig | None = None,
        logprob_gap_limit: float = math.inf,
    ) -> None:
        self.model_path, self.model_config, self.config, self.ppo = model_path, model, policy, ppo
        self.temperature, self.total_updates, self.seed, self.device = temperature, total_updates, seed, device
        self.machines = machines
        self.correction, self.logprob_gap_limit = correction, logprob_gap_limit
        self._once = UpdateOnce()

    def setup(self, peers: Mapping[str, Actor]) -> None:
        self.model = causal_model(
            self.model_path, self.model_config, self.device, quantization=self.config.adapter.quantization
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
        self.learner = PolicyLearner(
            self.model,
            engine,
            temperature=self.temperature,
            minibatch_size=self.ppo.minibatch_size,
            micro_batch_limit=self.config.micro_batch_limit(self.model.layout),
            ppo_epochs=self.ppo.ppo_epochs,
            clip_ratio=self.ppo.clip_ratio,
            clip_ratio_high=self.ppo.clip_ratio_high,
            dual_clip=self.ppo.dual_clip,
            entropy_coef=self.ppo.entropy_coef,
            kl_stop=self.ppo.kl_stop,
            adaptive_rate=adaptive_rate(self.config.optimizer),
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

    def save(self, folder: Path) -> None:
        """Weights in Hugging Face format (an adapter in peft's) and the optimiser."""
        tokenizer = load_tokenizer(self.model_path, self.model_config.revision)
        save_trained(self.model, self.learner, folder, self.model_path, tokenizer)

    def load(self, folder: Path) -> None:
        load_trained(self.model, self.learner, folder)

    def export(self, folder: Path) -> None:
        """The finished model: a plain Hugging Face folder, the adapter beside it when there is one."""
        write = self.ranks.rank == 0
        tokenizer = load_tokenizer(self.model_path, self.model_config.revision)
        adapters.export_merged(self.model.model, folder, tokenizer, write=write)
        if adapters.has_adapter(self.model.model):
            adapters.save_adapter(self.model.model, folder / "adapter", base=self.model_path, write=write)

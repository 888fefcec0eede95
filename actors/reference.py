"""The frozen policy that the KL penalty ties the learner to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from actors.loading import causal_model, split_frozen
from actors.policy import PolicyActor
from actors.worker import WHOLE, Actor
from alignment import adapters
from alignment.config import ModelConfig
from alignment.config.cluster import RoleConfig
from alignment.forward import response_logprobs
from alignment.learners.base import per_response
from alignment.packing import MicroBatchLimit
from alignment.quantization import Quantization
from alignment.types import Rollout


class ReferenceActor(Actor):
    """Log-probabilities under the starting policy. Beside a LoRA policy it is that policy with adapters off."""

    role = "reference"
    peers_needed = ("policy",)

    def __init__(
        self,
        *,
        model_path: str,
        model: ModelConfig,
        temperature: float,
        micro_batch_limit: MicroBatchLimit,
        quantization: Quantization = "none",
        device: str = "cpu",
        machines: RoleConfig = WHOLE,
    ) -> None:
        """
        Args:
            micro_batch_limit: whatever its layout, the model's own is taken.
            quantization: the policy's, whose start this is.
        """
        self.model_path, self.model_config, self.temperature = model_path, model, temperature
        self.micro_batch_limit, self.quantization, self.device = micro_batch_limit, quantization, device
        self.machines = machines

    def setup(self, peers: Mapping[str, Actor]) -> None:
        policy = peers.get("policy")
        if isinstance(policy, PolicyActor) and policy.training.adapter.enabled:
            self.model, self.shared, self.together = policy.model, True, policy.learner.engine.lockstep
            return
        model = causal_model(
            self.model_path, self.model_config, self.device, frozen=True, quantization=self.quantization
        )
        self.model, self.shared, self.together = split_frozen(model, self.lockstep), False, self.lockstep

    def logprobs(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        """Per rollout (R_i,) float32."""
        if not self.shared:
            return self._logprobs(rollouts)
        with adapters.adapter_disabled(self.model.model):
            return self._logprobs(rollouts)

    def _logprobs(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        def forward(ids: Tensor, mask: Tensor, response: Tensor) -> Tensor:
            return response_logprobs(self.model, ids, mask, response, temperature=self.temperature)[0]

        limit = dataclasses.replace(self.micro_batch_limit, layout=self.model.layout)
        with torch.no_grad():
            return per_response(rollouts, forward, limit=limit, device=self.device, lockstep=self.together)

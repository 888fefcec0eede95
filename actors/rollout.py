"""The sampler: transformers, embedded, with a copy of the weights of its own, or the policy's when colocated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from actors.loading import causal_model
from actors.policy import PolicyActor
from actors.weight_sync import WeightUpdate, unpack_weights
from actors.worker import Actor
from alignment.config import ModelConfig, RolloutConfig
from alignment.data.chat import decode, eos_ids_of_model, load_tokenizer, single_token
from alignment.generation import generate, sampling_seed
from alignment.types import Prompt, Rollout


class RolloutActor(Actor):
    """Answers prompts with the policy version it was last given."""

    role = "rollout"
    peers_needed = ("policy",)

    def __init__(
        self, *, model_path: str, model: ModelConfig, rollout: RolloutConfig, seed: int, device: str = "cpu"
    ) -> None:
        self.model_path, self.model_config, self.config = model_path, model, rollout
        self.seed, self.device = seed, device
        self.weight_version = 0

    def setup(self, peers: Mapping[str, Actor]) -> None:
        policy = peers.get("policy")
        self.shared = isinstance(policy, PolicyActor)
        if isinstance(policy, PolicyActor):
            self.model = policy.model
        else:
            self.model = causal_model(self.model_path, self.model_config, self.device, frozen=True)
        self.tokenizer = load_tokenizer(self.model_path, self.model_config.revision)
        self.stop_ids: frozenset[int] = frozenset()
        if not self.config.ignore_eos:
            ends = eos_ids_of_model(self.tokenizer, self.model_path, self.model_config.revision)
            self.stop_ids = ends | {single_token(self.tokenizer, stop) for stop in self.config.stop}

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        step: int,
        num_samples: int = 1,
        greedy: bool = False,
        max_new_tokens: int | None = None,
    ) -> list[Rollout]:
        """`num_samples` rollouts per prompt, in prompt order then sample order. The seed of each is its own."""
        jobs = [(prompt, index) for prompt in prompts for index in range(num_samples)]
        samples = generate(
            self.model,
            [prompt.prompt_ids for prompt, _ in jobs],
            [sampling_seed(self.seed, prompt.id, step, index) for prompt, index in jobs],
            max_new_tokens=max_new_tokens or self.config.max_new_tokens,
            temperature=self.config.temperature,
            stop_ids=self.stop_ids,
            greedy=greedy,
            max_batch=self.config.max_batch,
        )
        return [
            Rollout(
                prompt=prompt,
                sample_index=index,
                response_ids=sample.response_ids,
                rollout_logprobs=sample.rollout_logprobs,
                finish_reason=sample.finish_reason,
                response=decode(self.tokenizer, sample.response_ids),
                weight_version=self.weight_version,
            )
            for (prompt, index), sample in zip(jobs, samples, strict=True)
        ]

    @torch.no_grad()
    def receive_weights(self, update: WeightUpdate) -> int:
        """Take a policy version over. Raises when a byte differs from what was sent or a name is unknown."""
        if not self.shared:
            parameters = dict(self.model.model.named_parameters())
            for name, tensor in unpack_weights(update):
                parameters[name].copy_(tensor)
        self.weight_version = update.version
        return self.weight_version

    def follow(self, *, version: int) -> int:
        """Colocated with the policy there is nothing to carry: the weights are the same memory."""
        if not self.shared:
            raise RuntimeError("got follow() on an engine with weights of its own, expected receive_weights()")
        self.weight_version = version
        return version

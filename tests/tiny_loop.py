"""The PPO loop with all five roles of tiny models in this process, to be disturbed between its steps."""

from __future__ import annotations

import contextlib
import json

import torch

from actors.build import ppo_actors, ppo_roles
from actors.launch import local_groups
from alignment.config import ClusterConfig, PpoRunConfig
from alignment.data.chat import load_tokenizer
from alignment.data.prompts import load_prompts
from alignment.loops.ppo import PpoState
from alignment.loops.run import Run
from alignment.run_directory import RunDirectory


def config_of(
    tiny,
    *,
    num_steps: int,
    limit: float | None,
    policy: dict | None = None,
    reward: dict | None = None,
    hacking: dict | None = None,
    **rollout,
) -> PpoRunConfig:
    return PpoRunConfig.model_validate(
        {
            "run": {"num_steps": num_steps, "trackers": []},
            "data": {"source": {"path": f"{tiny}/prompts.jsonl"}, "held_out": 4},
            "model": {"path": str(tiny / "policy")},
            "reward": reward or {"functions": [{"name": "text:no_repetition"}], "missing_eos_penalty": 0.5},
            "rollout": {"engine": "transformers", "max_new_tokens": 8, **rollout},
            "kl": {"limit": limit},
            "policy": policy or {},
            "hacking": hacking or {},
            "ppo": {"rollout_batch_size": 4, "minibatch_size": 4},
        }
    )


class Loop:
    """A run of `train` with its five roles, one call after the other."""

    def __init__(self, tiny, folder, train, *, limit: float | None = None, **settings) -> None:
        config = config_of(tiny, num_steps=1, limit=limit, **settings)
        path = config.model.path
        self.tiny, self.train, self.limit, self.settings = tiny, train, limit, settings
        self.prompts = load_prompts(config.data, load_tokenizer(path)).train
        self.actors = ppo_actors(config, ClusterConfig(), model_path=path, critic_path=path)
        self.stack = contextlib.ExitStack()  # whoever closes it closes the engine
        self.roles = ppo_roles(self.stack.enter_context(local_groups(self.actors, ClusterConfig())))
        self.state = PpoState.start(config)
        self.directory = RunDirectory(folder)
        self.run = Run(self.directory, num_steps=2, checkpoint_every=1, keep_checkpoints=2, trackers=())

    def up_to(self, num_steps: int) -> None:
        self.train(
            config_of(self.tiny, num_steps=num_steps, limit=self.limit, **self.settings),
            self.prompts,
            policy=self.roles.policy,
            critic=self.roles.critic,
            reference=self.roles.reference,
            reward=self.roles.reward,
            rollout=self.roles.rollout,
            run=self.run,
            state=self.state,
        )

    def move_reference(self, noise: float) -> None:
        """Does to the KL what a policy that runs off does."""
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for _, parameter in self.actors["reference"].model.named_parameters():
                parameter += noise * torch.randn(parameter.shape, generator=generator)

    def sample_at(self, temperature: float) -> None:
        """The engine is told another temperature than the trainer."""
        sampler = self.actors["rollout"]
        sampler.config = sampler.config.model_copy(update={"temperature": temperature})

    def weights(self, role: str) -> list[torch.Tensor]:
        return [parameter.detach().clone() for _, parameter in self.actors[role].model.named_parameters()]

    def metrics(self) -> list[dict]:
        return [json.loads(line) for line in self.directory.metrics.read_text().splitlines()]

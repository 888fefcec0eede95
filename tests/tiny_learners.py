"""The policy's and the critic's learner on tiny models, and rollouts for them."""

from __future__ import annotations

import dataclasses

import torch

from alignment import adapters, models
from alignment.engines.torch import TorchEngine
from alignment.experience import make_experience
from alignment.learners.ppo import CriticLearner, PolicyLearner
from alignment.packing import MicroBatchLimit
from alignment.types import Prompt, Rollout


def rollouts_of(count, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def ids(low, high):
        length = int(torch.randint(low, high, (1,), generator=generator))
        return tuple(torch.randint(3, 200, (length,), generator=generator).tolist())

    made = []
    for i in range(count):
        response = ids(1, 9)
        made.append(
            Rollout(
                prompt=Prompt(id=str(i), messages=({"role": "user", "content": "q"},), prompt_ids=ids(2, 7)),
                sample_index=0,
                response_ids=response,
                rollout_logprobs=(-1.0,) * len(response),
                finish_reason="stop",
                response="r",
                weight_version=0,
            )
        )
    return made


def sampled_at(rollouts, logprobs):
    """The same rollouts, as a sampler with these log-probabilities reports them."""
    return [
        dataclasses.replace(rollout, rollout_logprobs=tuple(row.tolist()))
        for rollout, row in zip(rollouts, logprobs, strict=True)
    ]


def experience_of(rollouts):
    """Advantages of both signs, and one answer that nobody could score."""
    generator = torch.Generator().manual_seed(4)
    rows = [-torch.rand(len(r.response_ids), generator=generator) for r in rollouts]
    values = [torch.randn(len(r.response_ids), generator=generator) for r in rollouts]
    scores = [None if i == 1 else float(torch.randn((), generator=generator)) for i in range(len(rollouts))]
    return make_experience(
        sampled_at(rollouts, rows), scores, rows, rows, values, kl_coef=0.1, gamma=1.0, gae_lambda=0.9
    )[0]


def policy_learner(folder, *, micro_batch_size=4, lora=False, **settings):
    model = models.load_causal_lm(str(folder))
    if lora:
        adapters.attach_lora(model.model, r=4, alpha=8, seed=1)
    engine = TorchEngine(model.named_parameters(), lr=1e-3, total_updates=20, max_grad_norm=1e9)
    defaults = {"minibatch_size": 8, "ppo_epochs": 1, "temperature": 0.8}
    return PolicyLearner(
        model, engine, micro_batch_limit=MicroBatchLimit(rows=micro_batch_size), **{**defaults, **settings}
    )


def critic_learner(folder, *, micro_batch_size=4):
    model = models.load_scalar_model(str(folder), head="random", seed=3)
    engine = TorchEngine(model.named_parameters(), lr=1e-3, total_updates=20, max_grad_norm=1e9)
    return CriticLearner(model, engine, minibatch_size=8, micro_batch_limit=MicroBatchLimit(rows=micro_batch_size))


def state(learner):
    return {name: p.detach().clone() for name, p in learner.model.named_parameters()}


def gradients(learner, loss_of):
    learner.engine.step = lambda: {"skipped_count": 0.0}
    loss_of()
    return [p.grad.clone() for p in learner.engine.parameters]

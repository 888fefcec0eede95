"""A problem small enough to enumerate: two prompts, four tokens, three steps, so 64 answers each."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from alignment.types import Prompt, Rollout

VOCAB, LENGTH, NUM_PROMPTS = 4, 3, 2
ANSWERS = torch.tensor(list(itertools.product(range(VOCAB), repeat=LENGTH)))
NUM_STATES = 1 + VOCAB + VOCAB**2


class TabularPolicy(nn.Module):
    """A row of logits per (prompt, prefix). The prompt is its number written twice; both positions share the root row,
    and so does whatever stands behind the answer: training on either shows in the distribution."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(logits.clone())

    def hidden(self, input_ids, attention_mask, noise=None):
        prompt = input_ids[:, 0]
        state = torch.zeros_like(input_ids)
        state[:, 2] = 1 + input_ids[:, 2]
        if input_ids.shape[1] > 3:
            state[:, 3] = 1 + VOCAB + VOCAB * input_ids[:, 2] + input_ids[:, 3]
        return self.table[prompt.unsqueeze(1) * NUM_STATES + state.clamp(max=NUM_STATES - 1)]

    def head(self, hidden):
        return hidden

    def token_logps(self):
        """(prompts, 64, 3) log-probabilities of the tokens of every answer, in float64."""
        return token_logps(self.table.detach().double())

    def answer_logps(self):
        """(prompts, 64)."""
        return self.token_logps().sum(-1)


def token_logps(table: torch.Tensor) -> torch.Tensor:
    """(prompts, 64, 3) log-probabilities of the tokens of every answer under a table of logits, differentiable."""
    logits = table.view(NUM_PROMPTS, NUM_STATES, VOCAB).log_softmax(-1)
    first, second = ANSWERS[:, 0], ANSWERS[:, 1]
    states = torch.stack([torch.zeros_like(first), 1 + first, 1 + VOCAB + VOCAB * first + second], 1)
    return logits[:, states, ANSWERS]


def rollout_of(prompt: int, ids: tuple[int, ...], logprobs: tuple[float, ...] | None = None) -> Rollout:
    return Rollout(
        prompt=Prompt(id=str(prompt), messages=(), prompt_ids=(prompt, prompt)),
        sample_index=0,
        response_ids=ids,
        rollout_logprobs=(0.0,) * len(ids) if logprobs is None else logprobs,
        finish_reason="stop",
        response="",
        weight_version=0,
    )


def replace(experience, **changes):
    fields = {name: getattr(experience, name) for name in type(experience).__slots__}
    return type(experience)(**{**fields, **changes})

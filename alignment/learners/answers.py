"""Log-probabilities of whole answers, with and without a gradient: what learners from preferences share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alignment.batching import micro_batches, sequence_batch
from alignment.distributed import Ranks
from alignment.forward import response_logprobs
from alignment.learners.base import missing_passes
from alignment.models import CausalModel
from alignment.packing import MicroBatchLimit

Ids = tuple[int, ...]
Answer = tuple[Ids, Ids]
"""Ids of a prompt and of the answer behind it."""


def answer_batch(answers: Sequence[Answer], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded input_ids, attention_mask, response_mask, each (B, T)."""
    ids, mask = sequence_batch([prompt + answer for prompt, answer in answers], device)
    starts = torch.tensor([len(prompt) for prompt, _ in answers], device=device).unsqueeze(1)
    return ids, mask, mask & (torch.arange(ids.shape[1], device=device) >= starts)


def answer_logprobs(
    model: CausalModel, answers: Sequence[Answer], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """`(logprobs, response_mask)` of the tokens of answers, (B, T) each; logits exist at those tokens alone, and of a
    chunk of them at a time."""
    ids, mask, response = answer_batch(answers, device)
    logprobs, _ = response_logprobs(model, ids, mask, response, temperature=1.0)
    return logprobs, response


@torch.no_grad()
def answer_logps(
    model: CausalModel,
    answers: Sequence[Answer],
    *,
    limit: MicroBatchLimit,
    device: torch.device | str = "cpu",
    lockstep: Ranks | None = None,
) -> list[float]:
    """Log-probability of each answer, summed over its tokens, in the order given: of any model, a reference among
    them. `lockstep`: as for `alignment.learners.base.per_response`."""
    sums = torch.zeros(len(answers))
    lengths = answer_lengths(answers)
    batches = micro_batches(torch.arange(len(answers)), lengths, limit)
    nothing = torch.zeros(1, 2, dtype=torch.int64, device=device)
    for _ in range(missing_passes(len(batches), lockstep)):
        response_logprobs(model, nothing, nothing == 0, nothing == 1, temperature=1.0)
    for index in batches:
        logprobs, _ = answer_logprobs(model, [answers[i] for i in index.tolist()], device)
        sums[index] = logprobs.sum(1).cpu()
    return sums.tolist()


def answer_lengths(answers: Sequence[Answer]) -> Tensor:
    """(N,) tokens of prompt and answer."""
    return torch.tensor([len(prompt) + len(answer) for prompt, answer in answers])

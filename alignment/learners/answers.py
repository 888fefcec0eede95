"""Log-probabilities of whole answers, with and without a gradient: what learners from preferences share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from alignment.batching import micro_batches, sequence_batch
from alignment.distributed import Ranks
from alignment.forward import response_logprobs
from alignment.learners.base import missing_passes
from alignment.models import CausalModel, HfModel
from alignment.packing import MicroBatchLimit
from alignment.shared_prompts import by_prompt, shared_logprobs, shares_prompts
from alignment.types import pad_rows

Ids = tuple[int, ...]
Answer = tuple[Ids, Ids]
"""Ids of a prompt and of the answer behind it."""


def answer_batch(answers: Sequence[Answer], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded input_ids, attention_mask, response_mask, each (B, T)."""
    ids, mask = sequence_batch([prompt + answer for prompt, answer in answers], device)
    starts = torch.tensor([len(prompt) for prompt, _ in answers], device=device).unsqueeze(1)
    return ids, mask, mask & (torch.arange(ids.shape[1], device=device) >= starts)


def answer_logprobs(
    model: CausalModel,
    answers: Sequence[Answer],
    device: torch.device | str = "cpu",
    *,
    share_prompts: bool = False,
) -> tuple[Tensor, Tensor]:
    """`(logprobs, response_mask)` of the tokens of answers, (B, T) each; logits exist at those tokens alone, and of a
    chunk of them at a time. T counts prompts in, unless they are shared: then it is of the longest answer."""
    if share_prompts:
        units = by_prompt(answers)
        rows = shared_logprobs(model, [(answers[own[0]][0], [answers[i][1] for i in own]) for own in units], device)
        placed = dict(zip((i for own in units for i in own), rows, strict=True))
        ordered = [placed[i] for i in range(len(answers))]
        return pad_rows(ordered), pad_rows([torch.ones_like(row, dtype=torch.bool) for row in ordered])
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
    share_prompts: bool = False,
) -> list[float]:
    """Log-probability of each answer, summed over its tokens, in the order given: of any model, a reference among
    them. `lockstep`: as for `alignment.learners.base.per_response`. With `share_prompts` the rows of `limit` are
    prompts."""
    sums = torch.zeros(len(answers))
    units = by_prompt(answers) if share_prompts else [[i] for i in range(len(answers))]
    lengths = torch.tensor([len(answers[own[0]][0]) + sum(len(answers[i][1]) for i in own) for own in units])
    for index in forward_batches(model, lengths, sharing_limit(limit) if share_prompts else limit, device, lockstep):
        places = [i for unit in index.tolist() for i in units[unit]]
        logprobs, _ = answer_logprobs(model, [answers[i] for i in places], device, share_prompts=share_prompts)
        sums[places] = logprobs.sum(1).cpu()
    return sums.tolist()


@torch.no_grad()
def forward_batches(
    model: CausalModel, lengths: Tensor, limit: MicroBatchLimit, device: torch.device | str, lockstep: Ranks | None
) -> list[Tensor]:
    """Places of the rows of each forward without gradient; `lengths` as for `own_micro_batches`. Where ranks make
    passes together, this one has taken part, with nothing, in those that others have more."""
    batches = micro_batches(torch.arange(len(lengths)), lengths, limit)
    nothing = torch.zeros(1, 2, dtype=torch.int64, device=device)
    for _ in range(missing_passes(len(batches), lockstep)):
        response_logprobs(model, nothing, nothing == 0, nothing == 1, temperature=1.0)
    return batches


def sharing_limit(limit: MicroBatchLimit) -> MicroBatchLimit:
    """What a micro-batch may hold whose prompts are shared: rows of several groups have next to no padding."""
    return dataclasses.replace(limit, layout="one_row")


def refuse_unshared(model: CausalModel) -> None:
    """
    Raises:
        ValueError: prompts cannot be shared with this model: its answers would differ.
    """
    if not (isinstance(model, HfModel) and shares_prompts(model)):
        raise ValueError(
            "share_prompts: got True with a model that computes answers to a shared prompt otherwise than apart, "
            "expected full attention that takes a mask; set it to False"
        )


def answer_lengths(answers: Sequence[Answer]) -> Tensor:
    """(N,) tokens of prompt and answer."""
    return torch.tensor([len(prompt) + len(answer) for prompt, answer in answers])

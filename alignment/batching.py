"""Cut a batch into minibatches and micro-batches. No answer may depend on the cut: only memory and time do."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from alignment.types import Rollout, pad_rows


def minibatches(num_rows: int, size: int, *, epochs: int, seed: int, step: int) -> Iterator[tuple[int, Tensor]]:
    """(epoch, row indices): each epoch is one permutation of all rows, a pure function of (seed, step, epoch)."""
    for epoch in range(epochs):
        digest = hashlib.sha256(f"{seed}/{step}/{epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        order = torch.randperm(num_rows, generator=generator)
        for start in range(0, num_rows, size):
            yield epoch, order[start : start + size]


def micro_batches(index: Tensor, lengths: Tensor, size: int) -> list[Tensor]:
    """Split row indices into micro-batches of neighbours in length, so that padding is small. `lengths` is (B,)."""
    by_length = index[lengths[index].argsort(stable=True)]
    return list(by_length.split(size)) if len(index) else []


def sequence_batch(sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Right-padded ids and mask of ragged sequences: (B, T) int64 and (B, T) bool."""
    rows = [torch.tensor(ids, dtype=torch.int64) for ids in sequences]
    lengths = torch.tensor([len(row) for row in rows])
    ids = pad_rows(rows)
    mask = torch.arange(ids.shape[1]) < lengths.unsqueeze(1)
    return ids.to(device), mask.to(device)


def rollout_batch(rollouts: Sequence[Rollout], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded input_ids, attention_mask, response_mask, each (B, T)."""
    ids, mask = sequence_batch([rollout.input_ids for rollout in rollouts], device)
    prompt_lengths = torch.tensor([len(r.prompt.prompt_ids) for r in rollouts], device=device).unsqueeze(1)
    response = mask & (torch.arange(ids.shape[1], device=device) >= prompt_lengths)
    return ids, mask, response


def rollout_lengths(rollouts: Sequence[Rollout]) -> Tensor:
    """(B,) tokens of prompt + response."""
    return torch.tensor([len(rollout.input_ids) for rollout in rollouts])

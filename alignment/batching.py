"""Cut a batch into minibatches and micro-batches. No answer may depend on the cut: only memory and time do."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from alignment.distributed import balanced_parts
from alignment.packing import MicroBatchLimit
from alignment.types import Rollout, SftExample, pad_rows


def minibatches(num_rows: int, size: int, *, epochs: int, seed: int, step: int) -> Iterator[tuple[int, Tensor]]:
    """(epoch, row indices): each epoch is one permutation of all rows, a pure function of (seed, step, epoch)."""
    for epoch in range(epochs):
        digest = hashlib.sha256(f"{seed}/{step}/{epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        order = torch.randperm(num_rows, generator=generator)
        for start in range(0, num_rows, size):
            yield epoch, order[start : start + size]


def micro_batches(index: Tensor, lengths: Tensor, limit: MicroBatchLimit) -> list[Tensor]:
    """Split row indices into as few micro-batches as `limit` allows, those of a token limit about equally full.

    Padded, neighbours in length share one. Packed, long and short ones do: they fill each other's gaps.

    Args:
        lengths: (B,) tokens of each row's sequence, or (B, k) of its k sequences.
    """
    if not len(index):
        return []
    lengths = lengths.reshape(len(lengths), -1)
    by_length = index[lengths[index].amax(1).argsort(stable=True)]
    if limit.tokens is None:
        return list(by_length.split(limit.rows or len(index)))
    rows: list[list[int]] = lengths[by_length].tolist()
    parts = _neighbours(rows, limit) if limit.layout == "padded" else _mixed(rows, limit)
    return [by_length[part] for part in parts]


def _neighbours(rows: list[list[int]], limit: MicroBatchLimit) -> list[list[int]]:
    """Rows in ascending order of their longest sequence -> runs of them: the fewest, and the largest as small as can
    be. A run's tokens never shrink when it grows, so filling one after the other needs the fewest."""
    assert limit.tokens is not None

    def runs_within(tokens: int) -> list[list[int]]:
        runs: list[list[int]] = [[]]
        for i, row in enumerate(rows):
            padded = (len(runs[-1]) + 1) * len(row) * max(row)
            if runs[-1] and (padded > tokens or len(runs[-1]) == limit.rows):
                runs.append([])
            runs[-1].append(i)
        return runs

    fewest = len(runs_within(limit.tokens))
    return runs_within(bisect_left(range(limit.tokens), True, key=lambda t: len(runs_within(t)) <= fewest))


def _mixed(rows: list[list[int]], limit: MicroBatchLimit) -> list[list[int]]:
    """Rows -> parts with about the same number of tokens each, the fewest of which every one is allowed."""
    tokens = [sum(row) for row in rows]
    assert limit.tokens is not None
    full = sum(min(count, limit.tokens) for count in tokens) / limit.tokens
    fewest = max(1, math.ceil(full), math.ceil(len(rows) / (limit.rows or len(rows))))
    splits = (balanced_parts(tokens, count) for count in range(min(fewest, len(rows)), len(rows)))
    fitting = (parts for parts in splits if all(limit.allows([rows[i] for i in part]) for part in parts))
    return next(fitting, [[i] for i in range(len(rows))])


def sequence_batch(sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Right-padded ids and mask of ragged sequences: (B, T) int64 and (B, T) bool."""
    rows = [torch.tensor(ids, dtype=torch.int64) for ids in sequences]
    lengths = torch.tensor([len(row) for row in rows])
    ids = pad_rows(rows)
    mask = torch.arange(ids.shape[1]) < lengths.unsqueeze(1)
    return ids.to(device), mask.to(device)


def marked_batch(
    sequences: Sequence[Sequence[int]], reads: Sequence[Sequence[int]], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded input_ids and attention_mask, and the positions to read of each sequence as (B, T) bool."""
    ids, mask = sequence_batch(sequences)
    marks = torch.zeros_like(mask)
    for row, positions in zip(marks, reads, strict=True):
        row[list(positions)] = True
    return ids.to(device), mask.to(device), marks.to(device)


def sft_batch(examples: Sequence[SftExample], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded input_ids, attention_mask, response_mask, each (B, T)."""
    ids, mask = sequence_batch([example.input_ids for example in examples], device)
    response = pad_rows([torch.tensor(example.response_mask) for example in examples], value=False)
    return ids, mask, response.to(device)


def rollout_batch(rollouts: Sequence[Rollout], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded input_ids, attention_mask, response_mask, each (B, T)."""
    ids, mask = sequence_batch([rollout.input_ids for rollout in rollouts], device)
    prompt_lengths = torch.tensor([len(r.prompt.prompt_ids) for r in rollouts], device=device).unsqueeze(1)
    response = mask & (torch.arange(ids.shape[1], device=device) >= prompt_lengths)
    return ids, mask, response


def rollout_lengths(rollouts: Sequence[Rollout]) -> Tensor:
    """(B,) tokens of prompt + response."""
    return torch.tensor([len(rollout.input_ids) for rollout in rollouts])

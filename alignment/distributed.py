"""The ranks of a learner: who has which rows, and how gradients and metrics of all become one.

Every rank is given the whole batch, works on its share of each minibatch, divides by the count of all, and adds its
gradient to the others'. So the answer is that of one process, up to the rounding of a sum in another order, and a
rank without a single row takes part like the others.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_ELEMENTS = 16 * 2**20
"""Of gradients that are summed in one call: large enough that a call costs nothing, small beside a model."""


class Ranks(Protocol):
    """What a learner asks of the group of processes that it is one of."""

    rank: int
    size: int

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by the sum over ranks, the same bits on all of them."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """The plain value (what JSON can carry) of every rank, in their order."""
        ...


class Alone:
    """One process."""

    rank, size = 0, 1

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        return

    def gather(self, value: Any) -> list[Any]:
        return [value]


class GroupRanks:
    """Several, over a process group of torch.distributed (gloo or NCCL)."""

    def __init__(self, group: Any, *, device: torch.device | str = "cpu") -> None:
        """`device`: where the group's collectives run."""
        self.group, self.device = group, device
        self.rank, self.size = int(group.rank()), int(group.size())

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        bucket: list[Tensor] = []
        for tensor in tensors:
            if bucket and sum(t.numel() for t in bucket) + tensor.numel() > BUCKET_ELEMENTS:
                self._sum_bucket(bucket)
                bucket = []
            bucket.append(tensor)
        if bucket:
            self._sum_bucket(bucket)

    @torch.no_grad()
    def _sum_bucket(self, tensors: Sequence[Tensor]) -> None:
        flat = torch.cat([tensor.reshape(-1).to(self.device, torch.float32) for tensor in tensors])
        self.group.allreduce([flat], dist.AllreduceOptions()).wait()
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def gather(self, value: Any) -> list[Any]:
        data = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=self.device)
        sizes = self._gather_tensor(torch.tensor([len(data)], device=self.device))
        room = max(int(size) for size in sizes)
        rows = self._gather_tensor(torch.nn.functional.pad(data, (0, room - len(data))))
        return [json.loads(bytes(row[: int(n)].tolist())) for row, n in zip(rows, sizes, strict=True)]

    def _gather_tensor(self, tensor: Tensor) -> list[Tensor]:
        rows = [torch.empty_like(tensor) for _ in range(self.size)]
        self.group.allgather([rows], [tensor]).wait()
        return rows


def balanced_parts(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Share out sequences so that every part has about the same number of tokens; each in ascending order.

    The longest goes first, always to the part with the fewest tokens, and with the fewest sequences among equals
    (Graham 1969). A pure function: every rank computes the same.
    """
    shares: list[list[int]] = [[] for _ in range(parts)]
    heap = [(0, 0, part) for part in range(parts)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, count, least = heap[0]
        shares[least].append(i)
        heapq.heapreplace(heap, (tokens + lengths[i], count + 1, least))
    return [sorted(share) for share in shares]


def own_rows(index: Tensor, lengths: Tensor, ranks: Ranks) -> Tensor:
    """The rows of a minibatch that this rank works on. `index` picks rows of `lengths` (B,)."""
    if ranks.size == 1:
        return index
    return index[balanced_parts(lengths[index].tolist(), ranks.size)[ranks.rank]]


def sum_gradients(parameters: Sequence[Tensor], ranks: Ranks) -> None:
    """Add up the gradients of all ranks; one that has none counts as zeros, unless no rank has it."""
    if ranks.size == 1:
        return
    has = ranks.gather([parameter.grad is not None for parameter in parameters])
    shared = [parameter for parameter, column in zip(parameters, zip(*has, strict=True), strict=True) if any(column)]
    for parameter in shared:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    ranks.sum_([parameter.grad for parameter in shared if parameter.grad is not None])

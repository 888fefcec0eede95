"""What goes through Ray's object store, in forms that are cheap to pack and lie there once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import ray
import torch
from torch import Tensor


class Shelf:
    """The latest large arguments: groups that are given the same ones read the same copy.

    Each is kept until the next of its kind comes, about as long as a loop itself holds on to a step's records.
    """

    def __init__(self) -> None:
        self._value: Any = None
        self._ref: Any = None
        self._items: list[Any] = []
        self._parts: dict[tuple[int, ...], Any] = {}

    def whole(self, value: Any) -> ray.ObjectRef:
        """A record that every worker gets."""
        if self._ref is None or self._value is not value:
            self._value, self._ref = value, ray.put(value)
        return self._ref

    def part(self, items: Sequence[Any], part: Sequence[int]) -> ray.ObjectRef:
        """Some of `items`, as one worker gets them. Groups of the same size share all parts."""
        if len(items) != len(self._items) or any(a is not b for a, b in zip(items, self._items, strict=True)):
            self._items, self._parts = list(items), {}
        key = tuple(part)
        if key not in self._parts:
            self._parts[key] = ray.put([items[i] for i in part])
        return self._parts[key]


class Ragged(list[Tensor]):
    """Vectors of one dtype that travel as one array; a plain list of them arrives."""

    def __reduce__(self) -> Any:
        return split_again, (torch.cat(self).numpy(), [len(row) for row in self])


def split_again(flat: numpy.ndarray, sizes: Sequence[int]) -> list[Tensor]:
    """The vectors, in memory of their own: what arrives in the object store may not be written to."""
    return list(torch.from_numpy(flat.copy()).split(list(sizes)))


def packed(answer: Any) -> Any:
    """An actor's answer as it travels: each vector of thousands by itself would cost more than its bytes."""
    if isinstance(answer, tuple) and type(answer) is tuple:
        return tuple(packed(part) for part in answer)
    if isinstance(answer, list) and len(answer) > 1 and all(_is_row(row, answer[0]) for row in answer):
        return Ragged(answer)
    return answer


def _is_row(row: Any, first: Any) -> bool:
    return (
        isinstance(row, Tensor)
        and row.ndim == 1
        and row.dtype == first.dtype == torch.float32
        and row.device.type == "cpu"
        and not row.requires_grad
    )

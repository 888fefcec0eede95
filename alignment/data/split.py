"""Train and held-out records, and the rule that parts them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Split(Generic[T]):
    """Unpacks as `train, held_out = split`."""

    train: list[T]
    held_out: list[T]
    counts: Mapping[str, int] = field(default_factory=dict)
    """What became of the rows, by reason."""

    def __iter__(self) -> Iterator[list[T]]:
        yield self.train
        yield self.held_out

    def summary(self) -> str:
        """One line without any text of the data."""
        told = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in self.counts.items() if count)
        return f"{len(self.train)} train, {len(self.held_out)} held out ({told})"


def digest(text: str) -> str:
    """16 hex digits of sha1: an identity, no protection."""
    return hashlib.sha1(text.encode("utf-8"), usedforsecurity=False).hexdigest()[:16]


def own_group(values: Mapping[str, Any]) -> str | None:
    """The `group` that a row names, 0 among them; None for one without, as an empty cell of a table is."""
    named = values.get("group")
    return None if named is None or named == "" else str(named)


def hold_out(
    records: Sequence[T], wanted: int, *, group: Callable[[T], str], counts: Mapping[str, int], what: str
) -> Split[T]:
    """Keep out whole groups, in the order of a hash of their name, until `wanted` records are out.

    Where a record goes depends on its group and on how many hash below it, never on its place in the file: a row
    added elsewhere moves at most the groups at the border.

    Raises:
        ValueError: nothing is left to train on.
    """
    groups = np.array([int(digest(group(record)), 16) for record in records], dtype=np.uint64)
    out = held_out_groups(groups, wanted)
    train = [record for record, is_out in zip(records, out, strict=True) if not is_out]
    if not train:
        raise ValueError(
            f"data.held_out: got {wanted} of {len(records)} {what}, which leaves none to train on, expected some; "
            "lower data.held_out or add rows"
        )
    return Split(train, [record for record, is_out in zip(records, out, strict=True) if is_out], dict(counts))


def held_out_groups(groups: np.ndarray, wanted: int) -> np.ndarray:
    """Which records are out, by the rule of `hold_out`.

    Args:
        groups: (N,) uint64, `digest` of each record's group as a number.

    Returns:
        (N,) bool, true where the record is held out.
    """
    if not 0 < wanted < len(groups):
        return np.full(len(groups), wanted > 0)
    # In order of the hash, the record that fulfils the wish belongs to the last group that goes.
    return groups <= np.partition(groups, wanted - 1)[wanted - 1]

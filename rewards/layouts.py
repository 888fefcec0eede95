"""How the sequences of a batch lie in a forward: each in a row of its own, or what they begin with in common once.

Conversations begin alike: with the system prompt of a chat template, and with the question where one is answered
several times. Laid out as a tree, a token that begins several sequences is computed once, and sees its own ancestors
alone. There is no padding. Sequences, ids of tokens, are lists of integers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, Protocol

Ids = Sequence[int]


class Layout(Protocol):
    """What a batcher asks: which sequences share a batch, and what it costs."""

    def order(self, ids: Ids) -> Any:
        """Sorted by this key, neighbours are cheap together."""
        ...

    def grown(self, tokens: int, batch: Sequence[Ids], ids: Ids) -> int:
        """Tokens computed once a sorted batch that has `tokens` takes in one more."""
        ...


class PaddedRows:
    """A row for each sequence, as long as the longest."""

    def order(self, ids: Ids) -> int:
        return len(ids)

    def grown(self, tokens: int, batch: Sequence[Ids], ids: Ids) -> int:
        return (len(batch) + 1) * len(ids)


class SharedPrefixes:
    """What sequences begin with in common is computed once."""

    def order(self, ids: Ids) -> list[int]:
        return list(ids)

    def grown(self, tokens: int, batch: Sequence[Ids], ids: Ids) -> int:
        return tokens + len(ids) - (common_length(batch[-1], ids) if batch else 0)


def batch_tokens(layout: Layout, batch: Sequence[Ids]) -> int:
    """Tokens that a forward over a sorted batch computes."""
    tokens = 0
    for i, ids in enumerate(batch):
        tokens = layout.grown(tokens, batch[:i], ids)
    return tokens


def common_length(one: Ids, other: Ids) -> int:
    """How many tokens two sequences of one type begin with in common."""
    return bisect_left(range(min(len(one), len(other))), True, key=lambda i: one[: i + 1] != other[: i + 1])


def tree(sequences: Sequence[Ids]) -> tuple[list[int], list[int], list[list[int]]]:
    """Lay sequences out as a tree of tokens.

    Returns:
        ids and positions of its N tokens; and for each sequence, in the order given, where its tokens stand there.
    """
    ids: list[int] = []
    positions: list[int] = []
    paths: list[list[int]] = [[] for _ in sequences]
    before: Ids = ()
    path: list[int] = []
    for i in sorted(range(len(sequences)), key=lambda i: list(sequences[i])):
        own = list(sequences[i])
        start = common_length(before, own)
        path = [*path[:start], *range(len(ids), len(ids) + len(own) - start)]
        ids += own[start:]
        positions += range(start, len(own))
        paths[i], before = path, own
    return ids, positions, paths

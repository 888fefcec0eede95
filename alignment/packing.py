"""How many tokens a forward computes, and what a micro-batch may hold. Plain arithmetic, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Layout = Literal["padded", "packed", "one_row"]
"""How the sequences of a micro-batch lie in a forward: `padded` each in a row of its own, as long as the longest;
`packed` end to end in fewer rows of that length; `one_row` end to end in a single row, without any padding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatchLimit:
    """What one micro-batch may hold. None does not bound."""

    rows: int | None = None
    """Rows of the batch: sequences, or pairs of them."""
    tokens: int | None = None
    """Tokens that its forward computes, padding included. A row of more is a micro-batch of its own."""
    layout: Layout = "padded"
    """How the model lays them out."""

    def allows(self, rows: Sequence[Sequence[int]]) -> bool:
        """Whether rows whose sequences have these lengths may share a micro-batch."""
        if len(rows) == 1:
            return True
        if self.rows is not None and len(rows) > self.rows:
            return False
        return self.tokens is None or computed_tokens([n for row in rows for n in row], self.layout) <= self.tokens


def computed_tokens(lengths: Sequence[int], layout: Layout) -> int:
    """Tokens that one forward over sequences of these lengths computes."""
    if layout == "one_row":
        return sum(lengths)
    longest = max(lengths, default=0)
    return longest * (len(pack(lengths, longest)) if layout == "packed" else len(lengths))


def pack(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Which sequences share a row of `width` tokens: the longest first, each into the first row with room for it.

    First-fit decreasing takes at most 11/9 of the fewest possible rows, and one more (Johnson 1973). An empty sequence
    is in no row. A pure function of its arguments: equal sequences keep their order.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted((i for i, length in enumerate(lengths) if length), key=lambda i: (-lengths[i], i)):
        row = next((row for row, left in enumerate(room) if left >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows

"""What a recommender is compared with: the nearest neighbours of what somebody liked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class ItemNeighbours:
    """Item-based collaborative filtering on likes (Sarwar et al. 2001; Deshpande and Karypis 2004).

    Items i and j, liked by n_i and n_j people and by n_ij of them both, are alike by
    n_ij / (sqrt(n_i n_j) + shrinkage): the cosine of their columns, drawn to 0 where few people know them. A
    candidate's score is its likeness to each liked item, summed over those that are among its `neighbours` nearest.
    An item that nobody liked is like no other.
    """

    def __init__(self, likes: Sequence[tuple[int, int]], *, shrinkage: float = 10.0, neighbours: int = 100) -> None:
        """
        Args:
            likes: (user, item) pairs, each once, under any numbers.

        Raises:
            ValueError: a negative shrinkage, no neighbours, or no likes.
        """
        if shrinkage < 0 or neighbours < 1 or not likes:
            raise ValueError(
                f"got shrinkage={shrinkage:g}, neighbours={neighbours} and {len(likes)} likes, expected 0 or more, at "
                "least 1 and some; correct it"
            )
        rows = {user: row for row, user in enumerate(dict.fromkeys(user for user, _ in likes))}
        self._columns = {item: column for column, item in enumerate(sorted({item for _, item in likes}))}
        liked = torch.zeros(len(rows), len(self._columns), dtype=torch.float64)
        for user, item in likes:
            liked[rows[user], self._columns[item]] = 1
        both = liked.T @ liked
        size = both.diagonal().sqrt()
        likeness = (both / (size.outer(size) + shrinkage)).fill_diagonal_(0.0)
        if neighbours < len(self._columns):
            nearest = likeness.topk(neighbours, dim=1)
            likeness = torch.zeros_like(likeness).scatter_(1, nearest.indices, nearest.values)
        self._likeness: Tensor = likeness
        """(I, I) row i has the likeness of item i to its neighbours, 0 elsewhere."""

    def scores(self, liked: Sequence[int], candidates: Sequence[int]) -> list[float]:
        """Of each candidate for somebody who liked these items."""
        known = [self._columns[item] for item in liked if item in self._columns]
        sums = self._likeness[:, known].sum(1).tolist()
        return [sums[self._columns[item]] if item in self._columns else 0.0 for item in candidates]

"""What a recommender is compared with: the popularity of items, and the nearest neighbours of what somebody liked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class ItemNeighbours:
    """Item-based collaborative filtering on likes (Sarwar et al. 2001; Deshpande and Karypis 2004).

    Items i and j, liked by n_i and n_j people and by n_ij of them both, are alike by
    n_ij / (sqrt(n_i n_j) + shrinkage): the cosine of their columns, drawn to 0 where few people know them. A
    candidate's score is its likeness to each liked item, summed over those that are among its `neighbours` nearest.
    """

    def __init__(
        self, likes: Sequence[tuple[int, int]], num_items: int, *, shrinkage: float = 10.0, neighbours: int = 100
    ) -> None:
        """
        Args:
            likes: (user, item) pairs, each once; items are numbered from 0 below `num_items`.
        """
        if shrinkage < 0 or neighbours < 1:
            raise ValueError(
                f"got shrinkage={shrinkage:g}, neighbours={neighbours}, expected 0 or more and at least 1; correct it"
            )
        self.popularity = item_counts(likes, num_items)
        numbered = {user: row for row, user in enumerate(dict.fromkeys(user for user, _ in likes))}
        liked = torch.zeros(len(numbered), num_items, dtype=torch.float64)
        for user, item in likes:
            liked[numbered[user], item] = 1
        both = liked.T @ liked
        size = both.diagonal().sqrt()
        lengths = size.outer(size) + shrinkage
        likeness = torch.where(lengths > 0, both / lengths, 0.0).fill_diagonal_(0.0)
        if neighbours < num_items:
            nearest = likeness.topk(neighbours, dim=1)
            likeness = torch.zeros_like(likeness).scatter_(1, nearest.indices, nearest.values)
        self.likeness = likeness
        """(I, I) row i has the likeness of item i to its neighbours, 0 elsewhere."""

    def scores(self, liked: Sequence[int], candidates: Sequence[int]) -> Tensor:
        """(N,) float64 for the candidates of somebody who liked these items."""
        return self.likeness[list(candidates)][:, list(liked)].sum(1)


def item_counts(likes: Sequence[tuple[int, int]], num_items: int) -> Tensor:
    """(I,) float64: by how many people each item was liked."""
    items = torch.tensor([item for _, item in likes], dtype=torch.int64)
    return torch.bincount(items, minlength=num_items).double()

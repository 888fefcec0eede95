"""Half fine-tuning (Hui 2024, arXiv 2404.18466): full fine-tuning in rounds, in each of which half of the matrices of
every layer stay as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from alignment.adapters.layers import linear_layers
from alignment.sharding import decoder_layers


def attach_half(model: nn.Module, *, seed: int, half_round: int) -> HalfFineTuning:
    """Leave every parameter trainable; which ones an update trains, `begin_update` decides."""
    return HalfFineTuning(model, seed=seed, half_round=half_round)


class HalfFineTuning:
    """Freezes, layer by layer, half of the attention's matrices and half of the feed-forward's, with their biases.

    Two rounds belong together: what the first one freezes, the second one trains, and the other way round. Of an odd
    number the larger half is frozen in every other layer. Embeddings, norms and the head are trained in every round.
    A frozen parameter gets no gradient, so the optimiser touches neither it nor its moments.
    """

    def __init__(self, model: nn.Module, *, seed: int, half_round: int) -> None:
        self.model, self.seed, self.half_round = model, seed, half_round
        self._round: int | None = None
        self._groups = groups(model)

    def begin_update(self, update: int) -> None:
        current = update // self.half_round
        if current == self._round:
            return
        self._round = current
        frozen = self.frozen(current)
        for group in self._groups:
            for name in group:
                self.model.get_submodule(name).requires_grad_(name not in frozen)

    def frozen(self, round: int) -> set[str]:
        """Names of the linear layers that are not trained in a round."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + round // 2)
        result: set[str] = set()
        for number, group in enumerate(self._groups):
            order = torch.randperm(len(group), generator=generator).tolist()
            # Groups alternate between attention and feed-forward: by pairs, every other layer rounds up.
            first = (len(group) + number // 2 % 2) // 2
            chosen = order[first:] if round % 2 else order[:first]
            result.update(group[i] for i in chosen)
        return result

    def penalty(self) -> Tensor | None:
        return None

    def end_update(self, update: int) -> None:
        """Nothing is left to do."""

    def metrics(self) -> dict[str, float]:
        """`half/round`, from 0, and `half/trained_share` of all parameters."""
        parameters = list(self.model.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        return {
            "half/round": float(self._round or 0),
            "half/trained_share": trained / sum(p.numel() for p in parameters),
        }

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the number of the update and the seed tell."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._round = None


def groups(model: nn.Module) -> list[list[str]]:
    """Names of the linear layers of each decoder layer's attention, feed-forward, and so on, in order."""
    prefix, _ = decoder_layers(model)
    found: dict[tuple[str, str], list[str]] = {}
    for name in linear_layers(model):
        number, part = name[len(prefix) + 1 :].split(".")[:2]
        found.setdefault((number, part), []).append(name)
    return list(found.values())

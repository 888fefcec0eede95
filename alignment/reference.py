"""The model that a policy is compared with while it learns: the one it started as, or as it was a while ago."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from alignment import adapters, models
from alignment.checkpoint import load_state, save_state
from alignment.models import HfModel
from alignment.sharding import assign, collect, gathered

FOLDER = "reference"
ADAPTER_FILE = "adapter.pt"


class Reference(Protocol):
    """What either kind does. Where parameters are split over ranks, all ranks make the same calls."""

    def model(self) -> AbstractContextManager[HfModel]:
        """The model, for the time of a block without gradients."""
        ...

    def start(self) -> AbstractContextManager[HfModel]:
        """As `model`, but what it was at first. A copy of a whole model that has followed knows it no more."""
        ...

    def follow(self, share: float) -> None:
        """Go `share` of the way to where the policy is now (Gorbatovski 2024, arXiv 2404.09656). Below float32 a share
        of a small step is lost in rounding: 1 alone is of use there."""
        ...

    def release(self) -> None:
        """Let go of memory that only the next question needs."""
        ...

    def save(self, folder: Path, *, write: bool) -> None:
        """Write what is not the start any more; nothing where it is. `write`: False for a rank that takes part."""
        ...

    def load(self, folder: Path) -> None:
        """Put back what `save` wrote."""
        ...


class AdapterReference:
    """The policy with its adapter off, at no cost in memory; once it has followed, with the adapter of that moment."""

    def __init__(self, policy: HfModel) -> None:
        self._policy = policy
        self._kept: dict[str, Tensor] | None = None

    @contextmanager
    def model(self) -> Iterator[HfModel]:
        if self._kept is None:
            with self.start() as policy:
                yield policy
            return
        self._swap(self._kept)
        try:
            yield self._policy
        finally:
            self._swap(self._kept)

    @contextmanager
    def start(self) -> Iterator[HfModel]:
        with adapters.adapter_disabled(self._policy.model):
            yield self._policy

    def follow(self, share: float) -> None:
        assert share == 1, "a mean of two low-rank updates has a higher rank"
        self._kept = {name: p.detach().clone() for name, p in self._trained()}

    def release(self) -> None:
        """Nothing is held that the policy does not hold too."""

    def save(self, folder: Path, *, write: bool) -> None:
        if self._kept is None:
            return
        tensors = collect(self._kept.items(), keep=write)
        if write:
            (folder / FOLDER).mkdir()
            save_state(folder / FOLDER / ADAPTER_FILE, tensors)

    def load(self, folder: Path) -> None:
        file = folder / FOLDER / ADAPTER_FILE
        if not file.exists():
            self._kept = None
            return
        self.follow(1)
        assert self._kept is not None
        for name, value in load_state(file).items():
            assign(self._kept[name], value)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self._policy.model.named_parameters() if p.requires_grad]

    @torch.no_grad()
    def _swap(self, other: dict[str, Tensor]) -> None:
        """Exchange numbers in place: engines and optimisers hold on to the parameters themselves."""
        for name, parameter in self._trained():
            current = parameter.detach().clone()
            parameter.detach().copy_(other[name])
            other[name].copy_(current)


class FrozenReference:
    """A copy of a policy of which every parameter learns."""

    def __init__(self, policy: HfModel, load: Callable[[], HfModel]) -> None:
        """`load`: reads the start again, frozen."""
        self._policy, self._load = policy, load
        self._copy: HfModel | None = None
        self._moved = False

    @contextmanager
    def model(self) -> Iterator[HfModel]:
        yield self._loaded()

    @contextmanager
    def start(self) -> Iterator[HfModel]:
        assert not self._moved, "what it was is gone"
        yield self._loaded()

    @torch.no_grad()
    def follow(self, share: float) -> None:
        own = dict(self._loaded().model.named_parameters())
        for name, parameter in self._policy.model.named_parameters():
            new = gathered(parameter)
            if share < 1:
                new = gathered(own[name]).float().lerp(new.float(), share)
            assign(own[name], new.to(own[name].dtype))
        self._moved = True

    def release(self) -> None:
        if not self._moved:
            self._copy = None

    def save(self, folder: Path, *, write: bool) -> None:
        if self._moved:
            models.save_model(self._loaded(), folder / FOLDER, write=write)

    def load(self, folder: Path) -> None:
        self._moved = (folder / FOLDER).exists()
        if self._moved:
            models.load_weights(self._loaded(), folder / FOLDER)
        else:
            self._copy = None

    def _loaded(self) -> HfModel:
        if self._copy is None:
            self._copy = self._load()
        return self._copy

"""What the loops rely on. Anything with these methods fits: actor groups, in-process workers, one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from alignment.types import Experience, Prompt, Rollout, Score

T_co = TypeVar("T_co", covariant=True)
Metrics = Mapping[str, float]


class Pending(Protocol[T_co]):
    """A result on its way. Calls overlap by being started before `.result()`."""

    def result(self) -> T_co: ...


class Generator(Protocol):
    """Answers prompts. One prompt gives `num_samples` rollouts, in prompt order then sample order."""

    def generate(
        self, prompts: Sequence[Prompt], *, step: int, num_samples: int = 1, greedy: bool = False
    ) -> Pending[list[Rollout]]: ...

    def metrics(self) -> Metrics:
        """What to log about the calls since it was asked last."""
        ...


class Scorer(Protocol):
    """Numbers for answers, in the order given."""

    def score(self, rollouts: Sequence[Rollout]) -> Pending[list[Score]]: ...


class Saves(Protocol):
    """A part of a checkpoint: writes its files into a folder, reads them back."""

    def save(self, folder: Path) -> Pending[Any]: ...
    def load(self, folder: Path) -> Pending[Any]: ...


class LogprobWorker(Protocol):
    """Token log-probabilities of responses: entry i is (R_i,) float32 for rollout i of R_i response tokens."""

    def logprobs(self, rollouts: Sequence[Rollout]) -> Pending[list[Tensor]]: ...


class PolicyWorker(LogprobWorker, Saves, Protocol):
    """The model that learns. `update` with the same step twice returns the cached answer."""

    def update(self, experience: Experience, *, step: int) -> Pending[Metrics]: ...
    def update_on_policy(self, experience: Experience, *, step: int) -> Pending[Metrics]: ...
    def check(self, experience: Experience) -> Pending[Metrics]: ...
    def send_weights(self, rollout: Any, *, version: int) -> Pending[Any]: ...
    def export(self, folder: Path) -> Pending[Any]: ...


class ValueWorker(Saves, Protocol):
    """The critic: (R_i,) float32 values per rollout, value t being that of the state that emits token t."""

    def values(self, rollouts: Sequence[Rollout]) -> Pending[list[Tensor]]: ...
    def update(self, experience: Experience, *, step: int) -> Pending[Metrics]: ...
    def fit(
        self, rollouts: Sequence[Rollout], rewards: Sequence[Tensor], *, step: int, gamma: float, gae_lambda: float
    ) -> Pending[tuple[list[Tensor], Metrics]]: ...

"""What a way of training does around an optimiser step, beside choosing which parameters are trained."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class TrainingMethod(Protocol):
    """Told of every update by the learner; most methods need nothing of it and have none."""

    def begin_update(self, update: int) -> None:
        """Before the first forward of an update, counted from 0."""

    def penalty(self) -> Tensor | None:
        """A term that is added to the loss once per update, whatever the number of micro-batches and ranks."""

    def end_update(self, update: int) -> None:
        """After the optimiser's step, while the gradients that it took are there."""

    def metrics(self) -> dict[str, float]:
        """Where it stands, as `stage/name`."""

    def state_dict(self) -> dict[str, Any]:
        """Plain containers of tensors and numbers: what a resumed run needs beside the parameters."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put it back; the parameters are loaded before."""

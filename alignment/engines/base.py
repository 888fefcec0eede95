"""What all engines share: the rate of each update, the count of updates, and when to stop skipping them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from alignment.distributed import Alone, Ranks
from alignment.schedules import lr_factor

ZeroStage = Literal[0, 1, 2, 3]
Offload = Literal["none", "optimizer", "all"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """AdamW with warm-up, decay and clipping (Loshchilov 2019, arXiv 1711.05101)."""

    lr: float
    """Peak rate."""
    total_updates: int
    """Optimiser steps of the whole run."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Of matrices; vectors have none."""
    warmup_ratio: float = 0.0
    decay: str = "constant"
    min_lr_ratio: float = 0.0
    max_grad_norm: float = 1.0
    max_skipped_in_a_row: int = 3

    def rate(self, update: int) -> float:
        factor = lr_factor(
            update,
            total_updates=self.total_updates,
            warmup_ratio=self.warmup_ratio,
            decay=self.decay,
            min_lr_ratio=self.min_lr_ratio,
        )
        return self.lr * factor


def refuse_hook(hook: Callable[[], None] | None, engine: str) -> None:
    """Of an engine whose gradients no process has as a whole."""
    if hook is not None:
        raise ValueError(
            f"engine: got {engine} with a method that reads gradients after the step (adapter.type=adalora, half), "
            "expected torch with zero_stage 0; set them in the cluster YAML, or choose another adapter.type"
        )


class Engine(ABC):
    """How gradients become an optimiser step: `backward` per micro-batch, `step` per minibatch.

    A state that one engine saved is what every other loads, with any number of ranks.
    """

    in_lockstep = False
    """Whether each forward and backward is a meeting of all ranks."""

    def __init__(self, schedule: Schedule, ranks: Ranks | None) -> None:
        self.schedule = schedule
        self.ranks: Ranks = ranks or Alone()
        self.num_updates, self.num_skipped, self.skipped_in_a_row = 0, 0, 0
        self.rate_factor = 1.0

    @property
    def lockstep(self) -> Ranks | None:
        """The ranks that make every forward and backward together; None where each goes at its own pace."""
        return self.ranks if self.in_lockstep else None

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradient; the loss is already divided by the minibatch's count over all ranks."""

    @abstractmethod
    def _update(self, rate: float, before_forgetting: Callable[[], None] | None) -> float:
        """Sum over ranks, clip, step unless the norm is not finite, and forget the gradients. Returns the norm."""

    def step(self, *, before_forgetting: Callable[[], None] | None = None) -> dict[str, float]:
        """Clip, update, advance the schedule. A non-finite gradient skips the update and is counted.

        Args:
            before_forgetting: called after a step was made, while the gradients that it took, summed over ranks and
                clipped, are still at the parameters (at the masters of those below float32). Not called when
                the update is skipped.

        Raises:
            ValueError: `before_forgetting` of an engine whose gradients are not there as a whole.
            RuntimeError: `max_skipped_in_a_row` updates in a row were skipped; more of the same would train nothing.
        """
        rate = self.rate_factor * self.schedule.rate(self.num_updates)
        norm = self._update(rate, before_forgetting)
        finite = math.isfinite(norm)
        self.num_skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.num_updates += 1
        if self.skipped_in_a_row >= self.schedule.max_skipped_in_a_row:
            raise RuntimeError(
                f"optimizer: got a gradient norm of {norm} and skipped {self.skipped_in_a_row} updates in a row, "
                f"expected fewer than max_skipped_in_a_row={self.schedule.max_skipped_in_a_row}; look at "
                "optimizer.lr (too high), at model.dtype (too narrow), and at the reward for values that are infinite "
                "or not a number"
            )
        return {"lr": rate, "grad_norm": norm, "skipped_count": float(not finite)}

    def state_dict(self) -> dict[str, Any]:
        """Plain containers of tensors and numbers: readable by torch.load(weights_only=True). A meeting of all ranks;
        the tensors are the first one's.

        `moments`: AdamW's step, exp_avg and exp_avg_sq of each parameter by name; `masters`: the float32 copy of each
        that is below float32.
        """
        moments, masters = self._optimizer_state()
        return {
            "moments": moments,
            "masters": masters,
            "num_updates": self.num_updates,
            "num_skipped": self.num_skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "rate_factor": self.rate_factor,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put everything back, rounded weights included; the model's own weights are loaded before.

        Raises:
            ValueError: the state was saved with other parameters below float32.
        """
        expected = self._names_of_masters()
        if state["masters"].keys() != set(expected):
            raise ValueError(
                f"optimizer state: got float32 masters of {len(state['masters'])} parameters, expected "
                f"{len(expected)} of this model; resume with the model.dtype of the saved run"
            )
        self._load_optimizer_state(state["moments"], state["masters"])
        self.num_updates, self.num_skipped = state["num_updates"], state["num_skipped"]
        self.skipped_in_a_row, self.rate_factor = state["skipped_in_a_row"], state["rate_factor"]

    @abstractmethod
    def _names_of_masters(self) -> list[str]:
        """Trained parameters below float32."""

    @abstractmethod
    def _optimizer_state(self) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
        """Moments and masters by name, whole, on the first rank."""

    @abstractmethod
    def _load_optimizer_state(self, moments: dict[str, dict[str, Any]], masters: dict[str, Tensor]) -> None:
        """Take this process' part of them."""

"""One process, plain torch: how gradients become an optimiser step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from alignment.distributed import Alone, Ranks, sum_gradients
from alignment.schedules import lr_factor


class TorchEngine:
    """AdamW with warm-up, decay and clipping: `backward` per micro-batch, `step` per minibatch.

    A bfloat16 weight of 1 cannot move by less than 0.004, and most updates are smaller. So parameters below float32
    have a float32 master copy: gradients are summed in it, the optimiser steps on it, and it is rounded back into the
    model (Micikevicius 2018, arXiv 1710.03740, section 3.1). That costs 4 more bytes per weight: 18 in bfloat16
    (weight 2, master 4, gradient 4, moments 8) against 16 in float32.

    Raises:
        ValueError: a parameter is float16, whose gradients underflow without loss scaling.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        lr: float,
        total_updates: int,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_ratio: float = 0.0,
        decay: str = "constant",
        min_lr_ratio: float = 0.0,
        max_grad_norm: float = 1.0,
        max_skipped_in_a_row: int = 3,
        ranks: Ranks | None = None,
    ) -> None:
        """`ranks`: the processes that each hold this model and a part of every minibatch; None is this one alone."""
        self.ranks: Ranks = ranks or Alone()
        trained = [(name, p) for name, p in parameters if p.requires_grad]
        self.parameters = [p for _, p in trained]
        self._masters = {name: _with_master(name, p) for name, p in trained if p.dtype.itemsize < 4}
        self._stepped = [self._masters.get(name, p) for name, p in trained]
        groups = [
            {"params": [p for p in self._stepped if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in self._stepped if p.ndim < 2], "weight_decay": 0.0},
        ]
        fusible = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in self._stepped)
        self.optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps, fused=fusible or None
        )
        self.lr, self.max_grad_norm, self.max_skipped_in_a_row = lr, max_grad_norm, max_skipped_in_a_row
        self.num_updates, self.num_skipped, self.skipped_in_a_row = 0, 0, 0
        self.rate_factor = 1.0
        self._schedule = {
            "total_updates": total_updates,
            "warmup_ratio": warmup_ratio,
            "decay": decay,
            "min_lr_ratio": min_lr_ratio,
        }

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradient; the loss is already divided by the minibatch's count."""
        loss.backward()

    def step(self) -> dict[str, float]:
        """Clip, update, advance the schedule. A non-finite gradient skips the update and is counted.

        Raises:
            RuntimeError: `max_skipped_in_a_row` updates in a row were skipped; more of the same would train nothing.
        """
        rate = self.lr * self.rate_factor * lr_factor(self.num_updates, **self._schedule)  # type: ignore[arg-type]
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sum_gradients(self._stepped, self.ranks)
        norm = float(nn.utils.clip_grad_norm_(self._stepped, self.max_grad_norm))
        finite = math.isfinite(norm)
        if finite:
            self.optimizer.step()
            self._round_masters()
        self.num_skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.optimizer.zero_grad(set_to_none=True)
        self.num_updates += 1
        if self.skipped_in_a_row >= self.max_skipped_in_a_row:
            raise RuntimeError(
                f"optimizer: got a gradient norm of {norm} and skipped {self.skipped_in_a_row} updates in a row, "
                f"expected fewer than max_skipped_in_a_row={self.max_skipped_in_a_row}; look at optimizer.lr (too "
                "high), at model.dtype (too narrow), and at the reward for values that are infinite or not a number"
            )
        return {"lr": rate, "grad_norm": norm, "skipped_count": float(not finite)}

    @torch.no_grad()
    def _round_masters(self) -> None:
        for parameter, stepped in zip(self.parameters, self._stepped, strict=True):
            if stepped is not parameter:
                parameter.copy_(stepped)

    def state_dict(self) -> dict[str, Any]:
        """Plain containers of tensors and numbers: readable by torch.load(weights_only=True)."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "masters": {name: master.detach() for name, master in self._masters.items()},
            "num_updates": self.num_updates,
            "num_skipped": self.num_skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "rate_factor": self.rate_factor,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put everything back, the model's rounded weights included.

        Raises:
            ValueError: the state was saved with other parameters below float32.
        """
        if state["masters"].keys() != self._masters.keys():
            raise ValueError(
                f"optimizer state: got float32 masters of {len(state['masters'])} parameters, expected "
                f"{len(self._masters)} of this model; resume with the model.dtype of the saved run"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        for name, master in self._masters.items():
            master.copy_(state["masters"][name])
        self._round_masters()
        self.num_updates, self.num_skipped = state["num_updates"], state["num_skipped"]
        self.skipped_in_a_row, self.rate_factor = state["skipped_in_a_row"], state["rate_factor"]


def _with_master(name: str, parameter: nn.Parameter) -> nn.Parameter:
    """A float32 copy of `parameter` that takes over each gradient as soon as it is there."""
    if parameter.dtype == torch.float16:
        raise ValueError(
            f"model.dtype: got float16 for the trained {name}, expected float32 or bfloat16: gradients in float16 "
            "underflow without loss scaling; use bfloat16"
        )
    master = nn.Parameter(parameter.detach().float())
    parameter.register_post_accumulate_grad_hook(partial(_move_gradient, master))
    return master


def _move_gradient(master: nn.Parameter, parameter: Tensor) -> None:
    assert parameter.grad is not None
    gradient, parameter.grad = parameter.grad.float(), None
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)

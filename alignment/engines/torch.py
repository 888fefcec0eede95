"""One process, plain torch: how gradients become an optimiser step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from alignment.schedules import lr_factor


class TorchEngine:
    """AdamW with warm-up, decay and clipping: `backward` per micro-batch, `step` per minibatch."""

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
    ) -> None:
        trained = [(name, p) for name, p in parameters if p.requires_grad]
        self.parameters = [p for _, p in trained]
        groups = [
            {"params": [p for _, p in trained if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for _, p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps)
        self.lr, self.max_grad_norm, self.num_updates, self.num_skipped = lr, max_grad_norm, 0, 0
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
        """Clip, update, advance the schedule. A non-finite gradient skips the update and is counted."""
        rate = self.lr * self.rate_factor * lr_factor(self.num_updates, **self._schedule)  # type: ignore[arg-type]
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm))
        finite = norm == norm and norm != float("inf")
        if finite:
            self.optimizer.step()
        else:
            self.num_skipped += 1
        self.optimizer.zero_grad(set_to_none=True)
        self.num_updates += 1
        return {"lr": rate, "grad_norm": norm, "skipped_count": float(not finite)}

    def state_dict(self) -> dict[str, Any]:
        """Plain containers of tensors and numbers: readable by torch.load(weights_only=True)."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "num_updates": self.num_updates,
            "num_skipped": self.num_skipped,
            "rate_factor": self.rate_factor,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.num_updates, self.num_skipped = state["num_updates"], state["num_skipped"]
        self.rate_factor = state["rate_factor"]

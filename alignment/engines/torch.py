"""Plain torch: one process, or data-parallel ranks that each hold the whole model (DDP)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from alignment.distributed import Ranks, sum_gradients
from alignment.engines.base import Engine, Schedule
from alignment.sharding import assign, collect, gathered

MOMENTS = ("exp_avg", "exp_avg_sq")


class TorchEngine(Engine):
    """AdamW on parameters that this process holds; gradients of several ranks are summed once per optimiser step.

    A bfloat16 weight of 1 cannot move by less than 0.004, and most updates are smaller. So parameters below float32
    have a float32 master copy: gradients are summed in it, the optimiser steps on it, and it is rounded back into the
    model (Micikevicius 2018, arXiv 1710.03740, section 3.1). That costs 4 more bytes per weight: 18 in bfloat16
    (weight 2, master 4, gradient 4, moments 8) against 16 in float32.

    Raises:
        ValueError: a parameter is float16, whose gradients underflow without loss scaling.
    """

    def __init__(
        self, parameters: Iterable[tuple[str, nn.Parameter]], *, ranks: Ranks | None = None, **settings: Any
    ) -> None:
        """
        Args:
            parameters: by name; those that need no gradient are left alone.
            ranks: the processes that each have a part of every minibatch; None is this one alone.
            settings: those of `Schedule`.
        """
        super().__init__(Schedule(**settings), ranks)
        trained = [(name, p) for name, p in parameters if p.requires_grad]
        self.parameters = [p for _, p in trained]
        self._masters = {name: _with_master(name, p) for name, p in trained if p.dtype.itemsize < 4}
        self._stepped = {name: self._masters.get(name, p) for name, p in trained}
        self.optimizer = make_adamw(list(self._stepped.values()), self.schedule)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def _update(self, rate: float, before_forgetting: Callable[[], None] | None) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        stepped = list(self._stepped.values())
        self._sum_over_ranks(stepped)
        norm = float(gathered(nn.utils.clip_grad_norm_(stepped, self.schedule.max_grad_norm)))
        if norm < float("inf"):  # NaN is not
            self.optimizer.step()
            self._round_masters()
            if before_forgetting is not None:
                before_forgetting()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _sum_over_ranks(self, stepped: list[nn.Parameter]) -> None:
        sum_gradients(stepped, self.ranks)

    @torch.no_grad()
    def _round_masters(self) -> None:
        for parameter, stepped in zip(self.parameters, self._stepped.values(), strict=True):
            if stepped is not parameter:
                parameter.copy_(stepped)

    def _names_of_masters(self) -> list[str]:
        return list(self._masters)

    def _optimizer_state(self) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
        keep = self.ranks.rank == 0
        return torch_state(self.optimizer, self._stepped, keep=keep), collect(self._masters.items(), keep=keep)

    @torch.no_grad()
    def _load_optimizer_state(self, moments: dict[str, dict[str, Any]], masters: dict[str, Tensor]) -> None:
        for name, master in self._masters.items():
            assign(master, masters[name])
        load_torch_state(self.optimizer, self._stepped, moments)
        self._round_masters()


def torch_state(
    optimizer: torch.optim.AdamW, parameters: Mapping[str, Tensor], *, keep: bool
) -> dict[str, dict[str, Any]]:
    """Step and moments of each parameter by name, whole; nothing of those that never had a gradient."""
    moments: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        if state := optimizer.state.get(parameter):
            row = collect([(key, state[key]) for key in MOMENTS], keep=keep)
            moments[name] = {"step": float(gathered(state["step"])), **row}
    return moments if keep else {}


@torch.no_grad()
def load_torch_state(
    optimizer: torch.optim.AdamW, parameters: Mapping[str, Tensor], moments: Mapping[str, Mapping[str, Any]]
) -> None:
    """Put back what `torch_state` gave, or this process' part of it."""
    optimizer.state.clear()
    for name, parameter in parameters.items():
        if name not in moments:
            continue
        state: dict[str, Any] = {key: torch.zeros_like(parameter) for key in MOMENTS}
        for key, tensor in state.items():
            assign(tensor, moments[name][key])
        # The fused step wants its count beside the parameter.
        device = parameter.device if optimizer.defaults["fused"] else "cpu"
        state["step"] = torch.tensor(moments[name]["step"], dtype=torch.float32, device=device)
        optimizer.state[parameter] = state


def make_adamw(parameters: list[nn.Parameter], schedule: Schedule) -> torch.optim.AdamW:
    """Decoupled weight decay on matrices only; one fused pass where the parameters allow it."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": schedule.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    fusible = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=schedule.lr,
        betas=schedule.betas,
        eps=schedule.eps,
        fused=fusible or None,
    )


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

"""AdaLoRA (Zhang 2023, arXiv 2303.10512): low-rank updates as B diag(E) A whose total rank falls during the run, and
goes to the matrices where it matters most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alignment.adapters.layers import seeded, stored_transposed, target_names, train_adapter_only, tuner_layers


@dataclass(frozen=True, kw_only=True, slots=True)
class RankBudget:
    """How the total rank falls; shares are of all updates of the run."""

    target_r: int = 8
    """Mean rank of a matrix at the end."""
    warmup_share: float = 0.1
    final_share: float = 0.3
    interval: int = 1
    """Updates from one allocation to the next."""
    orthogonality: float = 0.5
    """Weight of the penalty."""


def attach_adalora(
    model: nn.Module,
    *,
    r: int,
    alpha: float,
    budget: RankBudget,
    total_updates: int,
    seed: int,
    target_modules: tuple[str, ...] | str = "all-linear",
    last_layers: int | None = None,
) -> AdaLora:
    """Put the factors into `model` in place, in float32; only they (and a scalar head) stay trainable.

    E starts at zero, so the adapted model equals the base until the first update.
    """
    from peft import AdaLoraConfig, inject_adapter_in_model

    names = target_names(model, target_modules, last_layers)
    config = AdaLoraConfig(
        init_r=r,
        target_r=budget.target_r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # any float
        lora_dropout=0.0,
        target_modules=names,
        fan_in_fan_out=stored_transposed(model, names),
        total_step=total_updates,
        # Rounded down, they leave at least one update between them.
        tinit=int(budget.warmup_share * total_updates),
        tfinal=int(budget.final_share * total_updates),
        deltaT=budget.interval,
        orth_reg_weight=budget.orthogonality,
    )
    with seeded(model, seed):
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        # Importance is a product of weight and gradient; and what is pruned has no rounded copy to come back from.
        if "lora_" in name:
            parameter.data = parameter.data.float()
    train_adapter_only(model)
    return AdaLora(model, config)


class AdaLora:
    """Scores every singular value by how much the loss depends on it, and sets the least to zero. One that was set to
    zero scores again with its gradient, and may come back while there is budget left to move.

    The total rank stays for `tinit` updates, falls with the cube of the time that is left (equation 12) until
    `tfinal` updates before the end, and then stays at target_r per matrix.
    """

    def __init__(self, model: nn.Module, config: Any) -> None:
        from peft.tuners.adalora.layer import RankAllocator

        self.model, self.config = model, config
        self.allocator = RankAllocator(model, config, "default")
        # By layer, which singular values are left: (r, 1) bool.
        self.kept = {
            name: torch.ones_like(layer.lora_E["default"], dtype=torch.bool) for name, layer in self._layers()
        }
        self.is_final = False

    def _layers(self) -> list[tuple[str, Any]]:
        return [(name, layer) for name, layer in tuner_layers(self.model) if hasattr(layer, "lora_E")]

    def begin_update(self, update: int) -> None:
        """Nothing to prepare."""

    def penalty(self) -> Tensor | None:
        """orthogonality * the mean over all A and B of ||A A^T - I||, Frobenius: as in the authors' code. The paper's
        equation 4 sums squares instead."""
        if not self.config.orth_reg_weight:
            return None
        distances = []
        for _, layer in self._layers():
            a, b = layer.lora_A["default"], layer.lora_B["default"]
            for gram in (a @ a.T, b.T @ b):
                distances.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
        return self.config.orth_reg_weight * torch.stack(distances).mean()

    @torch.no_grad()
    def end_update(self, update: int) -> None:
        """Score by this update's gradients, and allocate when it is time to."""
        step, end = update + 1, self.config.total_step - self.config.tfinal
        if not self.is_final:
            self.allocator.update_ipt(self.model)
            budget, due = self.allocator.budget_schedule(min(step, end))
            if step >= end or (due and budget < self.allocator.init_bgt):
                pattern = self.allocator.mask_to_budget(self.model, budget)
                self.kept = {
                    name: torch.tensor(pattern[f"{name}.lora_E.default"], device=old.device).unsqueeze(1)
                    for name, old in self.kept.items()
                }
            if step >= end:
                self.is_final = True
                self.allocator.reset_ipt()
        self._prune()

    def _prune(self) -> None:
        for name, layer in self._layers():
            layer.lora_E["default"].masked_fill_(~self.kept[name], 0.0)

    def metrics(self) -> dict[str, float]:
        """`adalora/rank_total`, and the rank of every matrix as `adalora/rank/NAME`."""
        ranks = {f"adalora/rank/{name}": float(kept.sum()) for name, kept in self.kept.items()}
        return {"adalora/rank_total": sum(ranks.values()), **ranks}

    def state_dict(self) -> dict[str, Any]:
        return {
            "importance": dict(self.allocator.exp_avg_ipt),
            "uncertainty": dict(self.allocator.exp_avg_unc),
            "kept": dict(self.kept),
            "is_final": self.is_final,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = next(iter(self.kept.values())).device
        here = {key: {name: t.to(device) for name, t in state[key].items()} for key in state if key != "is_final"}
        self.allocator.exp_avg_ipt, self.allocator.exp_avg_unc = here["importance"], here["uncertainty"]
        # The allocator takes a parameter for new when it has no last score.
        self.allocator.ipt = {name: torch.zeros_like(t) for name, t in here["importance"].items()}
        self.kept, self.is_final = here["kept"], bool(state["is_final"])

"""Losses of single answers that someone found good or bad: KTO and BCO, and advice on the weights of both classes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignment.aggregation import Metrics, aggregate, batch_mean, check_shapes
from alignment.masked import as_float

BALANCED = (1.0, 4 / 3)
"""Where desirable_weight n_desirable / (undesirable_weight n_undesirable) should lie (Ethayarajh 2024, section 4)."""


def kto_loss(
    logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    kl_baseline: float | Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    denominator: float | Tensor | None = None,
    num_desirable: int | None = None,
) -> tuple[Tensor, Metrics]:
    """Gains and losses against a point of reference (Ethayarajh 2024, arXiv 2402.01306, eq. 7 and 8). With
    r = log pi - log ref of an answer and z0 the baseline, the mean over answers of

        desirable_weight (1 - sigmoid(beta (r - z0))),  undesirable_weight (1 - sigmoid(beta (z0 - r))).

    The weights scale each answer's loss; they change neither the mean's count nor the metrics.

    Args:
        logps, ref_logps: (B,) sums over the tokens of an answer; only `logps` gets a gradient.
        desirable: (B,) bool. A batch of one class is fine.
        kl_baseline: mean log-ratio of mismatched answers over the whole global batch (`mismatched_kl`); without
            gradient, and 0 where it is below.
        denominator: global number of answers, when this is a micro-batch.
        num_desirable: how many of those are desirable; needed with `denominator`.

    Returns:
        The loss, and `kl` (the baseline's share of this micro-batch), `logps`, and of each class that is there
        `rewards/desirable`, `rewards/undesirable` (beta r).
    """
    gain, desirable = _log_ratio(logps, ref_logps, desirable), desirable.bool()
    zero = torch.as_tensor(kl_baseline, dtype=gain.dtype, device=gain.device).detach().clamp(min=0)
    good = desirable_weight * (1 - torch.sigmoid(beta * (gain - zero)))
    bad = undesirable_weight * (1 - torch.sigmoid(beta * (zero - gain)))
    metrics = _class_metrics(beta * gain.detach(), logps, desirable, denominator, num_desirable)
    loss = batch_mean(torch.where(desirable, good, bad), denominator)
    return loss, {**metrics, "kl": batch_mean(zero.expand_as(gain), denominator)}


def mismatched_kl(logps: Tensor, ref_logps: Tensor, *, denominator: float | Tensor | None = None) -> Tensor:
    """Mean log-ratio of answers to prompts they were not given for, without gradient: KTO's estimate of KL(pi || ref).

    Shares of micro-batches and of ranks add up to that of the global batch; only then is it cut at 0, by `kto_loss`.

    Args:
        logps, ref_logps: (B,).
        denominator: global number of mismatched answers, when this is a micro-batch.
    """
    check_shapes(logps, ref_logps=ref_logps)
    return batch_mean((as_float(logps) - as_float(ref_logps)).detach(), denominator)


def bco_loss(
    logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    reward_shift: float | Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    denominator: float | Tensor | None = None,
    num_desirable: int | None = None,
) -> tuple[Tensor, Metrics]:
    """A classifier whose logit is the implicit reward (Jung 2024, arXiv 2404.04656): the mean over answers of

        desirable_weight -log sigmoid(beta r - shift),  undesirable_weight -log sigmoid(shift - beta r).

    Args:
        reward_shift: half the sum of both classes' mean rewards, see `RewardShift`; without gradient.

    Other arguments and results as `kto_loss`, with `reward_shift` for `kl`.
    """
    rewards, desirable = beta * _log_ratio(logps, ref_logps, desirable), desirable.bool()
    shift = torch.as_tensor(reward_shift, dtype=rewards.dtype, device=rewards.device).detach()
    good, bad = -desirable_weight * logsigmoid(rewards - shift), -undesirable_weight * logsigmoid(shift - rewards)
    metrics = _class_metrics(rewards.detach(), logps, desirable, denominator, num_desirable)
    loss = batch_mean(torch.where(desirable, good, bad), denominator)
    return loss, {**metrics, "reward_shift": batch_mean(shift.expand_as(rewards), denominator)}


@dataclass(slots=True)
class RewardShift:
    """Half the sum of the mean rewards of either class, each a running mean over steps."""

    decay: float = 0.9
    """How much of a class's mean stays when a step brings another."""
    desirable: float | None = None
    undesirable: float | None = None

    @property
    def value(self) -> float:
        """The shift; of the class that was seen where there is one, 0 before any."""
        seen = [mean for mean in (self.desirable, self.undesirable) if mean is not None]
        return sum(seen) / len(seen) if seen else 0.0

    def update(self, *, desirable: float | None, undesirable: float | None) -> None:
        """Take in the mean rewards of a global batch; None where a class has none. One that is not finite would stay
        in the running mean for ever, and is left out."""
        self.desirable = self._moved(self.desirable, desirable)
        self.undesirable = self._moved(self.undesirable, undesirable)

    def _moved(self, mean: float | None, new: float | None) -> float | None:
        if new is None or not math.isfinite(new):
            return mean
        if mean is None:
            return new
        return self.decay * mean + (1 - self.decay) * new

    def state_dict(self) -> dict[str, Any]:
        return {"desirable": self.desirable, "undesirable": self.undesirable}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.desirable, self.undesirable = state["desirable"], state["undesirable"]


def imbalance(
    num_desirable: int, num_undesirable: int, *, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> str | None:
    """What is wrong with the balance of classes as they are trained: counts times weights. None where nothing is.

    Weights are told as they should be with the other left alone; no answer is ever repeated to balance.
    """
    good, bad = desirable_weight * num_desirable, undesirable_weight * num_undesirable
    counts = f"{num_desirable} desirable answers and {num_undesirable} undesirable ones"
    if not good or not bad:
        return f"got {counts}, with weights {desirable_weight:g} and {undesirable_weight:g}: one class alone is learnt"
    low, high = BALANCED
    # Weights written with three digits after the advice should satisfy it.
    if low * (1 - 1e-3) <= good / bad <= high * (1 + 1e-3):
        return None
    return (
        f"got {counts}, which count {good / bad:.3g} to 1, expected {low:.3g} to {high:.3g}; set desirable_weight to "
        f"{low * bad / num_desirable:.3g} .. {high * bad / num_desirable:.3g}, or undesirable_weight to "
        f"{good / high / num_undesirable:.3g} .. {good / low / num_undesirable:.3g}"
    )


def balanced_weights(
    num_desirable: float, num_undesirable: float, *, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> tuple[float, float]:
    """Weights `(desirable, undesirable)` with which classes are in balance: the one that counts too little is raised
    to the nearer end of `BALANCED`.

    Raises:
        ValueError: a class is missing.
    """
    if not num_desirable or not num_undesirable:
        raise ValueError(
            f"kto.balance: got auto with {num_desirable:g} desirable answers and {num_undesirable:g} undesirable "
            "ones, expected both; add rows of the other class"
        )
    low, high = BALANCED
    ratio = desirable_weight * num_desirable / (undesirable_weight * num_undesirable)
    return desirable_weight * max(1.0, low / ratio), undesirable_weight * max(1.0, ratio / high)


def _log_ratio(logps: Tensor, ref_logps: Tensor, desirable: Tensor) -> Tensor:
    check_shapes(logps, ref_logps=ref_logps, desirable=desirable)
    return as_float(logps) - as_float(ref_logps.detach())


def _class_metrics(
    rewards: Tensor,
    logps: Tensor,
    desirable: Tensor,
    denominator: float | Tensor | None,
    num_desirable: int | None,
) -> Metrics:
    """Means over each class that is there, in the whole batch if this is a part of one."""
    if (denominator is None) != (num_desirable is None):
        raise ValueError(
            f"num_desirable: got {num_desirable} with denominator {denominator}, expected both of the global batch or "
            "neither; give both"
        )
    num_good = int(desirable.sum()) if num_desirable is None else num_desirable
    num_all = len(desirable) if denominator is None else int(denominator)
    metrics = {"logps": batch_mean(as_float(logps.detach()), denominator)}
    for name, mask, count in (("desirable", desirable, num_good), ("undesirable", ~desirable, num_all - num_good)):
        if count:
            metrics[f"rewards/{name}"] = aggregate(rewards, mask, mode="token_mean", denominator=count)
    return metrics

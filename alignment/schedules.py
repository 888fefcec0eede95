"""The learning rate over a run: warm-up and decay by count, and the factor that follows the KL of each update."""

from __future__ import annotations

import math


def lr_factor(update_index: int, *, total_updates: int, warmup_ratio: float, decay: str, min_lr_ratio: float) -> float:
    """Share of the peak rate for one optimiser step: a straight rise, then the decay.

    Args:
        update_index: 0 for the first optimiser step.
        total_updates: optimiser steps of the whole run; later ones stay at the last factor.
        warmup_ratio: share of the steps that rise. The first step is above 0, the last of the rise is at 1.
        decay: "constant", "linear" or "cosine".
        min_lr_ratio: where "linear" and "cosine" end, at the very last step. A warm-up that takes every step, like a
            run of one step, leaves no room for a decay.
    """
    if decay not in ("constant", "linear", "cosine"):
        raise ValueError(f"decay: got {decay!r}, expected constant, linear or cosine; choose one of them")
    if update_index < 0 or total_updates < 1:
        raise ValueError(
            f"update_index, total_updates: got {update_index} and {total_updates}, expected at least 0 and 1; "
            "count optimiser steps from 0"
        )
    if not (0 <= warmup_ratio <= 1 and 0 <= min_lr_ratio <= 1):
        raise ValueError(
            f"warmup_ratio, min_lr_ratio: got {warmup_ratio} and {min_lr_ratio}, expected shares between 0 and 1; "
            "give shares, not counts"
        )
    num_rising = round(warmup_ratio * total_updates)
    if update_index < num_rising:
        return (update_index + 1) / num_rising
    peak, last = max(num_rising - 1, 0), total_updates - 1
    if decay == "constant" or last <= peak:
        return 1.0
    progress = min((update_index - peak) / (last - peak), 1.0)
    left = 1 - progress if decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return min_lr_ratio + (1 - min_lr_ratio) * left


class KlAdaptiveRate:
    """A factor on the learning rate that steers the KL of an update to a target.

    The rule of the adaptive KL penalty (Schulman 2017, arXiv 1707.06347, section 4), applied to the rate: an update
    that moved the policy more than twice the target divides the factor, less than half multiplies it.

    Attributes:
        value: the present factor, 1 at the start (or the nearest bound).
    """

    def __init__(self, target: float, bounds: tuple[float, float], factor: float = 1.5) -> None:
        low, high = bounds
        if not (target > 0 and factor > 1 and 0 < low <= high):
            raise ValueError(
                f"adaptive rate: got target={target}, bounds={bounds}, factor={factor}, expected target > 0, "
                "0 < low <= high and factor > 1; correct them"
            )
        self.target, self.bounds, self.factor = target, (low, high), factor
        self.value = self._bounded(1.0)

    def update(self, kl: float) -> float:
        """Move the factor after one update whose KL per token was `kl`, and return it. NaN counts as too far."""
        if not kl <= 2 * self.target:
            self.value = self._bounded(self.value / self.factor)
        elif kl < self.target / 2:
            self.value = self._bounded(self.value * self.factor)
        return self.value

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = self._bounded(float(state["value"]))

    def _bounded(self, value: float) -> float:
        return min(max(value, self.bounds[0]), self.bounds[1])

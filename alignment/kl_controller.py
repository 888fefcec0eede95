"""The controller of the KL penalty's weight. Plain numbers, so that a config refuses what the controller would."""

from __future__ import annotations

import math

ERROR_LIMIT = 0.2


def check_horizon(horizon: float, num_sequences: int) -> None:
    """Refuse a horizon within which one update could take the whole weight away.

    An update multiplies the weight by 1 + error x num_sequences / horizon, where |error| <= 0.2; the factor must stay
    above 0.

    Raises:
        ValueError: a horizon of at most 0.2 x num_sequences.
    """
    if horizon <= ERROR_LIMIT * num_sequences:
        raise ValueError(
            f"kl.horizon: got {horizon:g} for steps of {num_sequences} sequences, expected more than "
            f"{ERROR_LIMIT * num_sequences:g} ({ERROR_LIMIT:g} x sequences), or one update could take the weight of "
            "the penalty to 0 or below; raise it, or set kl.target to null"
        )


class AdaptiveKLController:
    """Steers the KL per sequence to a target by the weight of its penalty (Ziegler 2019, section 2.2).

    Attributes:
        value: the present kl_coef.
    """

    def __init__(self, kl_coef: float, target: float, horizon: float) -> None:
        for name, number in (("kl_coef", kl_coef), ("target", target), ("horizon", horizon)):
            if not (number > 0 or (name == "kl_coef" and number == 0)):
                raise ValueError(f"kl.{name}: got {number}, expected a positive number; correct it")
        self.value, self.target, self.horizon = float(kl_coef), float(target), float(horizon)

    def update(self, kl: float, num_sequences: int) -> float:
        """Move the weight after one batch, and return it.

        Args:
            kl: mean over the global batch of the sum over tokens of logprobs - ref_logprobs.
            num_sequences: sequences of that global batch.
        """
        kl = float(kl)
        if not math.isfinite(kl):
            raise ValueError(f"kl: got {kl}, expected a finite number; look for NaN log-probabilities in this batch")
        check_horizon(self.horizon, num_sequences)
        error = min(max(kl / self.target - 1, -ERROR_LIMIT), ERROR_LIMIT)
        self.value *= 1 + error * num_sequences / self.horizon
        return self.value

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = float(state["value"])

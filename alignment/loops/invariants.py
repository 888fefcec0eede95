"""What must hold before the first update, whatever the model and the machines; a FAIL stops the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from alignment.config import PpoRunConfig
from alignment.rollout_correction import GAP, MISMATCH_CAUSES


@dataclass(frozen=True, kw_only=True, slots=True)
class Invariant:
    """One line of the table."""

    name: str
    got: float
    limit: float
    look_at: str
    """Where the cause is, when it fails."""

    @property
    def holds(self) -> bool:
        # Written so that NaN fails.
        return abs(self.got) <= self.limit


TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""What other batch shapes may change in a log-probability, by the dtype of the matrix products."""

CLIPPED = {"float32": 0.0, "bfloat16": 1e-2}
"""The share of tokens that this alone may take beyond the clip range: in bfloat16 an unlikely token's log-probability
moves by more than 0.2 now and then (1.4e-3 of the tokens of SmolLM2-135M at temperature 1)."""


def check_first_step(
    config: PpoRunConfig, check: Mapping[str, float], metrics: Mapping[str, float], eos_is_trained: bool
) -> list[Invariant]:
    """The table of the first step. `check`: the first update's metrics, before it is made; `metrics`: the step's."""
    tolerance = TOLERANCE[config.model.dtype]
    return [
        Invariant(
            name="importance ratio - 1",
            got=check["ppo/ratio_mean"] - 1,
            limit=tolerance,
            look_at="dropout left on, or a temperature missing from the log-probabilities",
        ),
        Invariant(
            name="KL of the policy to itself",
            got=check["ppo/approx_kl"],
            limit=tolerance,
            look_at="old log-probabilities from another model state or batch order",
        ),
        Invariant(
            name="clip fraction",
            got=check["ppo/clip_fraction"],
            limit=CLIPPED[config.model.dtype],
            look_at="the same causes as the ratio",
        ),
        Invariant(
            name="KL to the reference",
            got=metrics["kl/per_token_k3"],
            limit=tolerance,
            look_at="the reference loads another checkpoint, dtype or template than the policy",
        ),
        Invariant(
            name="rollout - trainer log-probability gap",
            got=metrics[GAP],
            limit=config.logprob_gap_limit,
            look_at=MISMATCH_CAUSES,
        ),
        Invariant(
            name="template leaves EOS untrained",
            got=0.0 if eos_is_trained else 1.0,
            limit=0.0,
            look_at="the chat template closes the assistant's turn without an EOS token",
        ),
    ]


def table(invariants: Sequence[Invariant]) -> str:
    """PASS / FAIL lines, with what to look at after each FAIL."""
    lines = ["invariants before the first update"]
    for item in invariants:
        lines.append(f"  {'PASS' if item.holds else 'FAIL'}  {item.name:<40} {item.got:>10.2e}  limit {item.limit:g}")
        if not item.holds:
            lines.append(f"        look at: {item.look_at}")
    return "\n".join(lines)

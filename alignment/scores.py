"""From raw scores to the scores that PPO sees: penalties, clip, running normalisation. One sequence, one number."""

from __future__ import annotations

import math
from collections.abc import Sequence

from alignment.types import Rollout, Score


def length_penalty(length: int, *, max_new_tokens: int, buffer: int, penalty: float) -> float:
    """Soft overlong penalty (DAPO, arXiv 2503.14476): 0 up to `max - buffer` tokens, then linear down to -penalty."""
    if buffer == 0:
        return 0.0
    over = length - (max_new_tokens - buffer)
    return -penalty * min(max(over / buffer, 0.0), 1.0)


class ScoreNormalizer:
    """Running mean and variance of scores over the whole run (Welford 1962, merged by Chan 1979)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def update(self, scores: Sequence[float]) -> None:
        for score in scores:
            self.count += 1
            delta = score - self.mean
            self.mean += delta / self.count
            self.squares += delta * (score - self.mean)

    @property
    def std(self) -> float:
        """Biased; 1 until two different scores were seen."""
        variance = self.squares / self.count if self.count > 1 else 0.0
        return math.sqrt(variance) if variance > 0 else 1.0

    def __call__(self, score: float) -> float:
        return (score - self.mean) / self.std

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count, self.mean, self.squares = int(state["count"]), state["mean"], state["squares"]


def shape_scores(
    rollouts: Sequence[Rollout],
    scores: Sequence[Score],
    *,
    max_new_tokens: int,
    missing_eos_penalty: float = 0.0,
    overlong_buffer: int = 0,
    overlong_penalty: float = 1.0,
    clip: float | None = None,
    normalizer: ScoreNormalizer | None = None,
) -> list[float | None]:
    """Normalise, clip, then subtract what the answer's length and ending cost. None stays None: it is excluded.

    Penalties come after the clip, so that a clipped score still pays for a missing end. Whether the end is missing
    is told by `finish_reason`, never by looking for a token.
    """
    if normalizer is not None:
        normalizer.update([score.total for score in scores if score.total is not None])
    shaped: list[float | None] = []
    for rollout, score in zip(rollouts, scores, strict=True):
        if score.total is None:
            shaped.append(None)
            continue
        value = normalizer(score.total) if normalizer is not None else score.total
        if clip is not None:
            value = min(max(value, -clip), clip)
        if rollout.finish_reason == "length":
            value -= missing_eos_penalty
        value += length_penalty(
            len(rollout.response_ids), max_new_tokens=max_new_tokens, buffer=overlong_buffer, penalty=overlong_penalty
        )
        shaped.append(value)
    return shaped

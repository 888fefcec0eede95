"""Sampling."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from alignment.config.base import Config, Positive, PositiveFloat


class RolloutConfig(Config):
    """Sampling. While training, top-p and top-k are refused: see docs/sampling.md."""

    engine: Literal["transformers"] = "transformers"
    """The embedded engine; the cluster YAML may name another."""
    max_new_tokens: Positive = 64
    """Generation limit per response."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; every log-probability is taken at it."""
    top_p: float = 1.0
    """Must be 1 while training: a cut support would put log S into every ratio."""
    top_k: int = 0
    """Must be 0 while training, for the same reason."""
    stop: tuple[str, ...] = ()
    """Custom stop tokens beside EOS; each must be a single token of the vocabulary."""
    ignore_eos: bool = False
    """Answer to the limit whatever is sampled: for measuring speed."""
    max_batch: Positive = 64
    """Sequences decoded together by one engine."""
    logprob_gap_limit: PositiveFloat = 0.05
    """Largest mean |rollout - trainer| log-probability accepted before the first update."""

    @model_validator(mode="after")
    def _whole_support(self) -> RolloutConfig:
        if self.top_p != 1.0 or self.top_k != 0:
            raise ValueError(
                f"got top_p={self.top_p}, top_k={self.top_k}, expected 1.0 and 0: a cut support makes the trainer's "
                "log-probabilities differ from the sampler's; remove them, lower the temperature instead"
            )
        return self

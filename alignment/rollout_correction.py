"""Where the engine samples with other probabilities than the trainer computes: measure it, correct for it, or stop.

Even with the same weights, other kernels, another dtype or another batch shape moves a log-probability. The tokens
then come from a behaviour policy, the gradient is taken for another one, and the ratio of the two,
exp(old_logprobs - rollout_logprobs), tells how far apart they are: 1 at every token when they agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from alignment.losses import LOG_RATIO_LIMIT, Metrics, aggregate
from alignment.masked import masked_mean, masked_sum, zero_masked
from alignment.types import Rollout

CorrectionKind = Literal["token_tis", "sequence_tis", "icepop"]
GAP = "rollout/logprob_gap"
MISMATCH_METRICS = (GAP, "rollout/logprob_gap_max", "rollout/ratio_mean", "rollout/effective_sample_size")
MISMATCH_CAUSES = (
    "another temperature in the engine, a cut support (top-p, top-k), stale weights, the wrong adapter, another chat "
    "template or tokenizer, or a narrower dtype"
)


@torch.no_grad()
def mismatch_metrics(old_logprobs: Tensor, rollout_logprobs: Tensor, response_mask: Tensor) -> dict[str, float]:
    """How far the sampler is from the trainer, over the valid tokens of a whole batch.

    Args:
        old_logprobs, rollout_logprobs: (B, T), the trainer's before the update and the sampler's.
        response_mask: (B, T) bool.

    Returns:
        Under the names of `MISMATCH_METRICS`: mean and maximum of |rollout - old| in nats; mean of the ratio w of
        each token; and the effective sample size (Kish 1965) as a share of the n tokens, (sum w)^2 / (n sum w^2),
        which is 1 when all w are equal. Nothing when no token is valid.
    """
    if not response_mask.any():
        return {}
    difference = _difference(old_logprobs, rollout_logprobs, response_mask)
    gap, ratio = difference.abs(), _limited(difference).exp()
    mean, square = masked_mean(ratio, response_mask), masked_mean(ratio**2, response_mask)
    # Rounding may leave the square of the mean above the mean of equal squares.
    numbers = (masked_mean(gap, response_mask), gap.max(), mean, (mean**2 / square).clamp(max=1.0))
    return {name: float(number) for name, number in zip(MISMATCH_METRICS, numbers, strict=True)}


@torch.no_grad()
def correction_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    response_mask: Tensor,
    *,
    kind: str,
    cap: float = 2.0,
    low: float = 0.5,
    high: float = 5.0,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Factors for the loss of each token, from the ratio w = exp(old - rollout) of trainer to sampler.

    | kind | weight of a token | source |
    |---|---|---|
    | `token_tis` | min(w, cap) | truncated importance sampling, Yao et al. 2025 |
    | `sequence_tis` | min(product of the w of its response, cap) | the same, over sequences |
    | `icepop` | w inside [low, high], 0 outside | IcePop, arXiv 2510.18855 |

    Only `sequence_tis` with a cap above every product is unbiased: a token's own ratio knows nothing of the tokens
    before and after it. Its variance grows with the length of the response.

    Args:
        old_logprobs, rollout_logprobs: (B, T), the trainer's before the update and the sampler's.
        response_mask: (B, T) bool. Rows do not see each other.
        denominator: global number of response tokens, when this is a micro-batch.

    Returns:
        (B, T) float32 weights without gradient, 0 where masked, and means over the valid tokens:
        `correction_weight_mean`, and `correction_truncated_fraction` (TIS: share of tokens at the cap) or
        `correction_masked_fraction` (IcePop: share of tokens outside). A number that is not a number stays one.
    """
    if kind not in get_args(CorrectionKind):
        raise ValueError(f"kind: got {kind!r}, expected one of {get_args(CorrectionKind)}; choose one of them")
    log_ratio = _limited(_difference(old_logprobs, rollout_logprobs, response_mask))
    if kind == "sequence_tis":
        log_ratio = _limited(masked_sum(log_ratio, response_mask, dim=1)).unsqueeze(1).expand_as(log_ratio)
    ratio = log_ratio.exp()
    if kind == "icepop":
        name, changed = "correction_masked_fraction", (ratio < low) | (ratio > high)
        weights = torch.where(changed, 0.0, ratio)
    else:
        name, changed = "correction_truncated_fraction", ratio > cap
        weights = ratio.clamp(max=cap)

    def mean(x: Tensor) -> Tensor:
        return aggregate(x, response_mask, mode="token_mean", denominator=denominator)

    metrics = {"correction_weight_mean": mean(weights), name: mean(changed.float())}
    return zero_masked(weights, response_mask), metrics


def require_match(metrics: Mapping[str, float], limit: float, *, step: int) -> None:
    """Stop before an update on tokens that the trainer's policy would not have sampled.

    Args:
        metrics: those of `mismatch_metrics`, if any token was valid.
        limit: largest mean gap, in nats.

    Raises:
        RuntimeError: the gap is above the limit, or not a number.
    """
    gap = metrics.get(GAP)
    if gap is not None and not gap <= limit:
        raise RuntimeError(
            f"step {step}: got a mean gap of {gap:.3g} between the log-probabilities of sampler and trainer, expected "
            f"at most rollout.logprob_gap_limit={limit:g}; look for {MISMATCH_CAUSES}; if it is the engine's own "
            "arithmetic, choose a rollout.correction.kind and raise the limit"
        )


def require_current(rollouts: Sequence[Rollout], version: int) -> None:
    """Refuse answers of other weights than those that are about to learn from them or to be judged by them.

    Raises:
        RuntimeError: a weight sync was skipped, or came too late.
    """
    others = sorted({rollout.weight_version for rollout in rollouts} - {version})
    if others:
        raise RuntimeError(
            f"rollout: got answers sampled by weight versions {others}, expected {version} alone: a weight sync did "
            "not arrive; resume the run from its last step"
        )


def _difference(old_logprobs: Tensor, rollout_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """old - rollout in float32, 0 where masked."""
    return zero_masked(old_logprobs, response_mask) - zero_masked(rollout_logprobs, response_mask)


def _limited(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)

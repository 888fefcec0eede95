"""KL between the policy and its reference: estimators, the shaped reward, and the controller of its weight."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from alignment.kl_controller import AdaptiveKLController as AdaptiveKLController
from alignment.masked import as_float, masked_mean, masked_sum, zero_masked

KlEstimator = Literal["k1", "k2", "k3"]
LOG_RATIO_LIMIT = 20.0


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str, *, mask: Tensor | None = None) -> Tensor:
    """Per-token estimate of KL(policy || reference) on tokens that the policy sampled (Schulman 2020).

    With d = ref_logprobs - logprobs: k1 = -d (unbiased, can be negative), k2 = d^2 / 2 (biased, low variance),
    k3 = e^d - 1 - d (unbiased, low variance, never negative; d is held within +-20).

    Args:
        logprobs, ref_logprobs: the same shape.
        estimator: "k1", "k2" or "k3".
        mask: the same shape; hidden entries are 0 and get no gradient. Without it garbage in is garbage out, entry
            by entry.

    Returns:
        That shape, in nats.
    """
    _same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    log_ratio = as_float(ref_logprobs) - as_float(logprobs)
    if mask is not None:
        log_ratio = zero_masked(log_ratio, mask)
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio**2 / 2
    if estimator == "k3":
        log_ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        return torch.expm1(log_ratio) - log_ratio
    raise ValueError(f"kl_estimator: got {estimator!r}, expected k1, k2 or k3; choose one of them")


def kl_loss(
    logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, *, estimator: str, denominator: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The KL term of a loss, as the mean over response tokens or their sum over `denominator`.

    On on-policy samples the gradient of k2 is that of KL(policy || reference), the gradient of k3 that of the other
    direction, KL(reference || policy). All tensors (B, T).

    Raises:
        ValueError: for k1, whose expected gradient is 0 whatever the reference is.
    """
    if estimator == "k1":
        raise ValueError(
            "kl_estimator: got k1 for a loss, expected k2 or k3: the gradient of k1 does not depend on the reference; "
            "use k2, or put k1 into the reward"
        )
    per_token = kl_estimate(logprobs, ref_logprobs.detach(), estimator, mask=response_mask)
    if denominator is None:
        loss = masked_mean(per_token, response_mask)
    else:
        loss = masked_sum(per_token, response_mask) / denominator
    return loss, {"kl": loss.detach()}


@torch.no_grad()
def shaped_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    *,
    kl_coef: float,
    kl_estimator: str = "k1",
) -> Tensor:
    """Reward of every token: -kl_coef * KL, plus the score at the last response token (Ziegler 2019, eq. 2).

    Args:
        scores: (B,), one per sequence. A row without response tokens gets nothing, whatever its score.
        logprobs, ref_logprobs: (B, T) under the policy that sampled and under the reference.
        response_mask: (B, T) bool.
        kl_coef: 0 leaves the reference unread.

    Returns:
        (B, T) float32, without gradient, 0 where masked.
    """
    _same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, response_mask=response_mask)
    if scores.shape != response_mask.shape[:1]:
        raise ValueError(
            f"scores: got shape {tuple(scores.shape)}, expected ({response_mask.shape[0]},), one per sequence; "
            "return one number per row"
        )
    mask = response_mask.bool()
    rewards = torch.zeros_like(zero_masked(logprobs, mask))
    if kl_coef:
        rewards = -kl_coef * kl_estimate(logprobs, ref_logprobs, kl_estimator, mask=mask)
    steps = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    last = torch.where(mask, steps, -1).amax(1, keepdim=True)
    return torch.where(steps == last, rewards + scores.to(rewards.dtype).unsqueeze(1), rewards)


def _same_shape(**tensors: Tensor) -> None:
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        raise ValueError(f"shapes: got {shapes}, expected one shape; align them")

"""Losses as pure functions: tensors in, `(loss, metrics)` out. `aggregate` is the one place that takes means.

Metrics are detached scalar tensors. Without `denominator` they are means over the valid tokens (or pairs). With it
each is a sum over `denominator`, so that loss and metrics of the micro-batches of one minibatch add up to those of the
whole, whatever the split. A name that ends in `_max` is a maximum instead, of which the largest counts.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignment.aggregation import Aggregation, Metrics, aggregate, check_shapes
from alignment.label_losses import bco_loss, kto_loss
from alignment.masked import zero_masked
from alignment.preference_losses import cpo_loss, dpo_loss, orpo_loss, simpo_loss

__all__ = [
    "Aggregation",
    "JudgementKind",
    "Metrics",
    "RankingKind",
    "aggregate",
    "bco_loss",
    "cpo_loss",
    "dpo_loss",
    "judgement_loss",
    "kto_loss",
    "orpo_loss",
    "ppo_policy_loss",
    "ppo_value_loss",
    "ranking_loss",
    "reward_model_loss",
    "sft_loss",
    "simpo_loss",
]

RankingKind = Literal["pairwise", "plackett_luce"]
JudgementKind = Literal["cross_entropy", "squared"]
LOG_RATIO_LIMIT = 20.0


def sft_loss(
    logprobs: Tensor, response_mask: Tensor, *, denominator: float | Tensor | None = None
) -> tuple[Tensor, Metrics]:
    """Cross-entropy of the tokens to learn: their mean negative log-likelihood, in nats.

    Args:
        logprobs: (B, T), of the tokens themselves.
        response_mask: (B, T) bool, tokens that are learnt.
        denominator: global number of such tokens, when this is a micro-batch.

    Returns:
        The loss, and `loss`.
    """
    check_shapes(response_mask, logprobs=logprobs)
    loss = aggregate(-zero_masked(logprobs, response_mask), response_mask, mode="token_mean", denominator=denominator)
    return loss, {"loss": loss.detach()}


def ppo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    clip_ratio: float,
    clip_ratio_high: float | None = None,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Clipped surrogate (Schulman 2017, arXiv 1707.06347, eq. 7), with the dual clip of Ye 2020 (1912.09729, eq. 5).

    Args:
        logprobs, old_logprobs, advantages: (B, T); only `logprobs` gets a gradient.
        response_mask: (B, T) bool.
        clip_ratio: the ratio is clipped to [1 - clip_ratio, 1 + clip_ratio_high]; the latter defaults to the former.
        dual_clip: bounds the loss of a negative advantage by -advantage * dual_clip; above 1, None switches it off.
        weights: (B, T) factors of each token's loss, without gradient; None is 1. They change neither the metrics nor
            the denominator: a token of weight 0 still counts as one.
        denominator: global number of response tokens, when this is a micro-batch.

    Returns:
        The loss, and `clip_fraction`, `approx_kl` (k3 of KL(old || new)), `ratio_mean`, `ratio_max`.
    """
    shaped = {} if weights is None else {"weights": weights}
    check_shapes(response_mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, **shaped)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip: got {dual_clip}, expected above 1; 3.0 is customary, None switches it off")
    log_ratio = zero_masked(logprobs, response_mask) - zero_masked(old_logprobs.detach(), response_mask)
    log_ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    advantages = zero_masked(advantages.detach(), response_mask)
    ratio = log_ratio.exp()
    high = clip_ratio if clip_ratio_high is None else clip_ratio_high

    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_ratio, 1 + high)
    per_token = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        per_token = torch.where(advantages < 0, torch.minimum(per_token, -advantages * dual_clip), per_token)
    if weights is not None:
        per_token = per_token * zero_masked(weights.detach(), response_mask)

    def mean(x: Tensor) -> Tensor:
        return aggregate(x, response_mask, mode="token_mean", denominator=denominator)

    with torch.no_grad():
        metrics = {
            "clip_fraction": mean((clipped > unclipped).float()),
            "approx_kl": mean(torch.expm1(log_ratio) - log_ratio),
            "ratio_mean": mean(ratio),
            "ratio_max": zero_masked(ratio, response_mask).max(),
        }
    return mean(per_token), metrics


def ppo_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    *,
    value_clip: float | None,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Half the squared error to the returns, the larger of plain and clipped (Schulman 2017's implementation).

    Args:
        values, old_values, returns: (B, T), or any one shape; only `values` gets a gradient.
        response_mask: that shape, bool.
        value_clip: how far a value may move from `old_values` before the clipped error counts; None switches it off.
        denominator: global number of response tokens, when this is a micro-batch.

    Returns:
        The loss, and `clip_fraction`, `squared_error` (without clip or factor).

    Raises:
        ValueError: shapes differ; (B,) against (B, 1) would broadcast to (B, B).
    """
    check_shapes(response_mask, values=values, old_values=old_values, returns=returns)
    values = zero_masked(values, response_mask)
    old_values = zero_masked(old_values.detach(), response_mask)
    returns = zero_masked(returns.detach(), response_mask)
    error = (values - returns) ** 2
    worst = error
    if value_clip is not None:
        clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
        worst = torch.maximum(error, (clipped - returns) ** 2)

    def mean(x: Tensor) -> Tensor:
        return aggregate(x, response_mask, mode="token_mean", denominator=denominator)

    with torch.no_grad():
        metrics = {"clip_fraction": mean((worst > error).float()), "squared_error": mean(error)}
    return 0.5 * mean(worst), metrics


def reward_model_loss(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    margin: Tensor | None = None,
    center_coef: float = 0.0,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Bradley-Terry: -log sigmoid(chosen - rejected - margin) + center_coef * (chosen + rejected)^2.

    The margin is Llama 2's (arXiv 2307.09288, section 3.2.2), the centring Eisenstein's (arXiv 2312.09244).

    Args:
        chosen_scores, rejected_scores: (P,), one pair per row.
        margin: (P,), None for 0.
        denominator: global number of pairs, when this is a micro-batch.

    Returns:
        The loss, and `accuracy` (a tie counts as wrong), `margin`, `chosen_score`, `rejected_score`.
    """
    every = torch.ones_like(chosen_scores, dtype=torch.bool)
    margin = torch.zeros_like(chosen_scores) if margin is None else margin
    check_shapes(every, rejected_scores=rejected_scores, margin=margin)
    chosen, rejected = zero_masked(chosen_scores, every), zero_masked(rejected_scores, every)
    gap = chosen - rejected

    def mean(x: Tensor) -> Tensor:
        return aggregate(x, every, mode="token_mean", denominator=denominator)

    loss = mean(-logsigmoid(gap - margin) + center_coef * (chosen + rejected) ** 2)
    with torch.no_grad():
        metrics = {
            "accuracy": mean((gap > 0).float()),
            "margin": mean(gap),
            "chosen_score": mean(chosen),
            "rejected_score": mean(rejected),
        }
    return loss, metrics


def ranking_loss(
    scores: Tensor,
    ranks: Tensor,
    mask: Tensor,
    *,
    kind: str = "pairwise",
    center_coef: float = 0.0,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Several answers to one prompt, put in order: the mean over rankings of one of

    - "pairwise": -1/N sum over the N pairs i better than j of log sigmoid(s_i - s_j) (Ouyang 2022, arXiv 2203.02155,
      eq. 1, where N = K (K - 1) / 2); answers that tie make no pair; center_coef * (s_i + s_j)^2 as for pairs;
    - "plackett_luce": -sum_k log(exp s_k / sum_{j >= k} exp s_j), answers in order (Luce 1959, Plackett 1975).

    Of two answers both are Bradley-Terry.

    Args:
        scores, ranks: (R, K), one ranking per row, the best answer first; ranks rise, ties share one.
        mask: (R, K) bool, answers that are there.
        denominator: global number of rankings, when this is a micro-batch.

    Returns:
        The loss, and `accuracy` (share of a ranking's pairs in the right order, a tie of scores is wrong), `margin`.

    Raises:
        ValueError: a tie, or a centring, with "plackett_luce".
    """
    if kind not in get_args(RankingKind):
        raise ValueError(f"kind: got {kind!r}, expected one of {get_args(RankingKind)}; choose one of them")
    check_shapes(mask, scores=scores, ranks=ranks)
    scores = zero_masked(scores, mask)
    better = (ranks.unsqueeze(2) < ranks.unsqueeze(1)) & mask.unsqueeze(2) & mask.unsqueeze(1)
    rows, pairs = mask.shape[0], better.flatten(1)
    gap = (scores.unsqueeze(2) - scores.unsqueeze(1)).flatten(1)
    count = float(rows) if denominator is None else denominator

    def mean(x: Tensor) -> Tensor:
        return aggregate(x, pairs, mode="sequence_mean", denominator=count)

    if kind == "pairwise":
        both = (scores.unsqueeze(2) + scores.unsqueeze(1)).flatten(1)
        loss = mean(-logsigmoid(gap) + center_coef * both**2)
    else:
        present = mask.sum(1)
        if center_coef or (better.sum((1, 2)) < present * (present - 1) // 2).any():
            raise ValueError(
                "plackett_luce: got answers that tie, or a center_coef, expected an order without ties, whose scores "
                "have no natural zero; use pairwise"
            )
        left = torch.ones_like(better).triu() & mask.unsqueeze(1)
        rest = scores.unsqueeze(1).masked_fill(~left, -torch.inf).logsumexp(2)
        loss = aggregate(rest - scores, mask, mode="sequence_sum", denominator=count)
    with torch.no_grad():
        metrics = {"accuracy": mean((gap > 0).float()), "margin": mean(gap)}
    return loss, metrics


def judgement_loss(
    scores: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    kind: str = "cross_entropy",
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Fit p = sigmoid(score) to what people say of an answer by itself, or of a step of one (Lightman 2023, arXiv
    2305.20050): a label 0 or 1, or a rating in between.

    "cross_entropy" is -t log p - (1 - t) log(1 - p), with labels logistic regression (Cox 1958), with ratings lowest
    where p is their mean; "squared" is (p - t)^2 (Brier 1950).

    Args:
        scores, targets: (N,), one answer or step each; targets in 0 .. 1.
        weights: (N,) not negative, how much each counts; None is 1.
        denominator: global sum of weights, when this is a micro-batch.

    Returns:
        The loss, and `accuracy` (score and target on one side of the middle; in the middle is above it), `error`
        (mean of |p - t|), `score`.
    """
    if kind not in get_args(JudgementKind):
        raise ValueError(f"kind: got {kind!r}, expected one of {get_args(JudgementKind)}; choose one of them")
    every = torch.ones_like(scores, dtype=torch.bool)
    weights = torch.ones_like(targets) if weights is None else weights
    check_shapes(every, targets=targets, weights=weights)
    scores, count = zero_masked(scores, every), weights.sum() if denominator is None else denominator

    def mean(x: Tensor) -> Tensor:
        return aggregate(weights * x, every, mode="token_mean", denominator=count)

    probability = scores.sigmoid()
    if kind == "cross_entropy":
        loss = mean(-targets * logsigmoid(scores) - (1 - targets) * logsigmoid(-scores))
    else:
        loss = mean((probability - targets) ** 2)
    with torch.no_grad():
        metrics = {
            "accuracy": mean(((scores >= 0) == (targets >= 0.5)).float()),
            "error": mean((probability - targets).abs()),
            "score": mean(scores),
        }
    return loss, metrics

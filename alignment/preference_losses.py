"""Losses of pairs of answers, from the log-probabilities of whole answers.

h is the gap between the two log-ratios to the reference, of the chosen and of the rejected answer. Answers may be
compared by the sum over their tokens, or by the mean over them: then their lengths are given.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignment.aggregation import Metrics, batch_mean, check_shapes
from alignment.masked import as_float, zero_masked

Variant = Literal["sigmoid", "robust", "ipo", "hinge"]


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None,
    ref_rejected_logps: Tensor | None,
    *,
    beta: float,
    variant: str = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Preferences learnt without a reward model (Rafailov 2023, arXiv 2305.18290, eq. 7): the mean over pairs of

    - "sigmoid": -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h), where eps is `label_smoothing`: 0 is DPO,
      above it cDPO (Mitchell 2023, eq. 3), which holds sigmoid(beta h) at 1 - eps;
    - "robust": (-(1 - eps) log sigmoid(beta h) + eps log sigmoid(-beta h)) / (1 - 2 eps), whose mean over labels
      flipped with probability eps is that of DPO with the true ones (Chowdhury 2024, arXiv 2403.00409);
    - "ipo": (h - 1 / (2 beta))^2 (Azar 2023, arXiv 2310.12036, eq. 17);
    - "hinge": max(0, 1 - beta h) (Zhao 2023, arXiv 2305.10425; Liu 2023, arXiv 2309.06657).

    Args:
        chosen_logps, rejected_logps: (P,) sums over the tokens of an answer, one pair per row.
        ref_chosen_logps, ref_rejected_logps: (P,) of the reference, without gradient; None for both compares the
            log-probabilities themselves.
        chosen_lengths, rejected_lengths: (P,) tokens of each answer, to compare means over tokens in place of sums.
            Sums are the letter of the papers, means what IPO's authors ran.
        denominator: global number of pairs, when this is a micro-batch.

    Returns:
        The loss, and `rewards/chosen`, `rewards/rejected` (beta times what is compared), `accuracy` (a tie is wrong),
        `margin`, `logps/chosen`, `logps/rejected`.

    Raises:
        ValueError: shapes differ; a variant that is none; label_smoothing where it has no meaning.
    """
    _check_smoothing(variant, label_smoothing)
    _check_beta(beta)
    chosen = _compared(chosen_logps, ref_chosen_logps, chosen_lengths)
    rejected = _compared(rejected_logps, ref_rejected_logps, rejected_lengths)
    check_shapes(chosen, rejected_logps=rejected)
    gap = chosen - rejected
    if variant == "ipo":
        per_pair = (gap - 1 / (2 * beta)) ** 2
    elif variant == "hinge":
        per_pair = (1 - beta * gap).clamp(min=0)
    elif variant == "robust":
        right, flipped = -logsigmoid(beta * gap), -logsigmoid(-beta * gap)
        per_pair = ((1 - label_smoothing) * right - label_smoothing * flipped) / (1 - 2 * label_smoothing)
    else:
        per_pair = _smoothed(beta * gap, label_smoothing)
    return _reduced(per_pair, beta * chosen, beta * rejected, chosen_logps, rejected_logps, denominator)


def cpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    *,
    beta: float,
    variant: str = "sigmoid",
    label_smoothing: float = 0.0,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Contrastive preferences: `dpo_loss` with a uniform reference (Xu 2024, arXiv 2401.08417, eq. 3). The paper adds
    the likelihood of the chosen answer, here `chosen_sft_loss`."""
    return dpo_loss(
        chosen_logps,
        rejected_logps,
        None,
        None,
        beta=beta,
        variant=variant,
        label_smoothing=label_smoothing,
        denominator=denominator,
    )


def simpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float,
    margin: float,
    label_smoothing: float = 0.0,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """-log sigmoid(beta (mean log-probability chosen - rejected) - margin), without a reference (Meng 2024, arXiv
    2405.14734, eq. 6, where the margin is gamma). Arguments and results otherwise as `dpo_loss`."""
    _check_smoothing("sigmoid", label_smoothing)
    _check_beta(beta)
    chosen = beta * _compared(chosen_logps, None, chosen_lengths)
    rejected = beta * _compared(rejected_logps, None, rejected_lengths)
    check_shapes(chosen, rejected_logps=rejected)
    per_pair = _smoothed(chosen - rejected - margin, label_smoothing)
    return _reduced(per_pair, chosen, rejected, chosen_logps, rejected_logps, denominator)


def orpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """-beta log sigmoid of the log odds ratio of the answers' mean token probabilities, without a reference (Hong
    2024, arXiv 2403.07691, eq. 6 and 7, where beta is lambda). The paper adds it to `chosen_sft_loss`.

    Arguments and results otherwise as `dpo_loss`; `log_odds_ratio` beside them.
    """
    _check_beta(beta)
    chosen = _compared(chosen_logps, None, chosen_lengths)
    rejected = _compared(rejected_logps, None, rejected_lengths)
    check_shapes(chosen, rejected_logps=rejected)
    log_odds_ratio = _log_odds(chosen) - _log_odds(rejected)
    per_pair = -beta * logsigmoid(log_odds_ratio)
    loss, metrics = _reduced(per_pair, beta * chosen, beta * rejected, chosen_logps, rejected_logps, denominator)
    return loss, {**metrics, "log_odds_ratio": batch_mean(log_odds_ratio.detach(), denominator)}


def chosen_sft_loss(
    chosen_logps: Tensor, chosen_lengths: Tensor, *, denominator: float | Tensor | None = None
) -> Tensor:
    """The likelihood of chosen answers as a term of its own: their mean negative log-probability per token.

    Args:
        chosen_logps, chosen_lengths: (P,) sums over tokens, and how many.
        denominator: global number of tokens of chosen answers, when this is a micro-batch.
    """
    check_shapes(chosen_logps, chosen_lengths=chosen_lengths)
    count = chosen_lengths.sum() if denominator is None else denominator
    return batch_mean(-as_float(chosen_logps), count)


def length_desensitised_logps(
    logprobs: Tensor, response_mask: Tensor, common_lengths: Tensor, *, alpha: float
) -> Tensor:
    """Log-probabilities of answers in which what goes beyond the shorter answer's length counts `alpha` times (LD-DPO,
    Liu 2024, arXiv 2409.06411): 1 is the plain sum, 0 cuts both answers to one length.

    Args:
        logprobs, response_mask: (B, T), of the tokens of answers.
        common_lengths: (B,) tokens of the shorter answer of the pair.

    Returns:
        (B,), of the policy or of the reference: both are weighted alike.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"length_alpha: got {alpha}, expected 0 to 1; 1 switches it off")
    logprobs = zero_masked(logprobs, response_mask)
    beyond = response_mask.long().cumsum(1) > common_lengths.unsqueeze(1)
    return torch.where(beyond, alpha * logprobs, logprobs).sum(1)


def counted_lengths(chosen_lengths: Tensor, rejected_lengths: Tensor, *, alpha: float) -> tuple[Tensor, Tensor]:
    """Tokens as `length_desensitised_logps` counts them, (P,) each: what a mean over tokens divides its sum by."""
    common = torch.minimum(chosen_lengths, rejected_lengths)
    return common + alpha * (chosen_lengths - common), common + alpha * (rejected_lengths - common)


def _compared(logps: Tensor, ref_logps: Tensor | None, lengths: Tensor | None) -> Tensor:
    """Log-ratio to the reference, by token where lengths are given."""
    ratio = as_float(logps)
    if ref_logps is not None:
        check_shapes(logps, ref_logps=ref_logps)
        ratio = ratio - as_float(ref_logps.detach())
    if lengths is not None:
        check_shapes(logps, lengths=lengths)
        ratio = ratio / lengths.clamp(min=1)
    return ratio


def _smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


def _log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p <= 0, in the form that keeps its digits on either side of p = 1/2 (Maechler 2012)."""
    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    log_rest = torch.where(logps > -math.log(2), torch.log(-torch.expm1(logps)), torch.log1p(-torch.exp(logps)))
    return logps - log_rest


def _reduced(
    per_pair: Tensor,
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    denominator: float | Tensor | None,
) -> tuple[Tensor, Metrics]:
    with torch.no_grad():
        parts = {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "accuracy": (chosen_rewards > rejected_rewards).float(),
            "margin": chosen_rewards - rejected_rewards,
            "logps/chosen": as_float(chosen_logps),
            "logps/rejected": as_float(rejected_logps),
        }
        metrics = {name: batch_mean(part, denominator) for name, part in parts.items()}
    return batch_mean(per_pair, denominator), metrics


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta: got {beta}, expected above 0; 0.1 is customary")


def _check_smoothing(variant: str, label_smoothing: float) -> None:
    if variant not in get_args(Variant):
        raise ValueError(f"variant: got {variant!r}, expected one of {get_args(Variant)}; choose one of them")
    if variant in ("ipo", "hinge") and label_smoothing:
        raise ValueError(f"label_smoothing: got {label_smoothing} with {variant}, expected 0; use sigmoid or robust")
    # At one half a robust loss would divide by nothing: such labels say nothing.
    if not 0 <= label_smoothing <= 0.5 or (variant == "robust" and label_smoothing == 0.5):
        raise ValueError(
            f"label_smoothing: got {label_smoothing}, expected a share of flipped labels from 0 to below 0.5; lower it"
        )

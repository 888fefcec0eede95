"""Rollouts + scores + log-probabilities + values -> Experience, the one padded record that the learners read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alignment.advantages import gae
from alignment.batching import rollout_batch
from alignment.hacking import duplicate_shares
from alignment.kl import kl_estimate, shaped_rewards
from alignment.masked import masked_mean, whiten
from alignment.rollout_correction import mismatch_metrics
from alignment.types import Experience, Rollout, pad_rows


def align(rollouts: Sequence[Rollout], per_response: Sequence[Tensor], length: int) -> Tensor:
    """Ragged (R_i,) numbers of responses -> (B, length) float32, entry t speaking of token t."""
    rows = []
    for rollout, numbers in zip(rollouts, per_response, strict=True):
        if len(numbers) != len(rollout.response_ids):
            raise ValueError(
                f"per-token numbers: got {len(numbers)}, expected {len(rollout.response_ids)}; "
                "return one number per sampled token"
            )
        rows.append(torch.cat([numbers.new_zeros(len(rollout.prompt.prompt_ids)), numbers]).float())
    return pad_rows(rows, length=length)


def reward_rows(
    rollouts: Sequence[Rollout],
    scores: Sequence[float | None],
    old_logprobs: Sequence[Tensor],
    ref_logprobs: Sequence[Tensor],
    *,
    kl_coef: float,
    kl_estimator: str = "k1",
    whiten_rewards: bool = False,
) -> tuple[Tensor, Tensor]:
    """KL-shaped rewards (B, T) and the mask (B, T) of the tokens to learn from; a row without a score has none."""
    if len(scores) != len(rollouts):
        raise ValueError(f"scores: got {len(scores)}, expected {len(rollouts)}, one per rollout; return one each")
    _, _, response_mask = rollout_batch(rollouts)
    scored = torch.tensor([score is not None for score in scores])
    learn = response_mask & scored.unsqueeze(1)
    old, ref = (align(rollouts, rows, learn.shape[1]) for rows in (old_logprobs, ref_logprobs))
    totals = torch.tensor([0.0 if score is None else score for score in scores])
    rewards = shaped_rewards(totals, old, ref, learn, kl_coef=kl_coef, kl_estimator=kl_estimator)
    return (whiten(rewards, learn, shift_mean=False) if whiten_rewards else rewards), learn


def make_experience(
    rollouts: Sequence[Rollout],
    scores: Sequence[float | None],
    old_logprobs: Sequence[Tensor],
    ref_logprobs: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    kl_coef: float,
    kl_estimator: str = "k1",
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
    whiten_advantages: bool = True,
    whiten_rewards: bool = False,
) -> tuple[Experience, dict[str, float]]:
    """Everything PPO needs of one batch, and what to log about it.

    Args:
        scores: one per rollout, after shaping; None excludes the row: its response mask is empty, its advantage 0.
        old_logprobs, ref_logprobs, values: per rollout (R_i,), under the trainer, the reference and the critic.

    The returns are taken before the advantages are whitened (formulae: Schulman 2015b, Ziegler 2019).
    """
    rewards, learn = reward_rows(
        rollouts,
        scores,
        old_logprobs,
        ref_logprobs,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        whiten_rewards=whiten_rewards,
    )
    input_ids, attention_mask, _ = rollout_batch(rollouts)
    length = input_ids.shape[1]
    old, ref, value = (align(rollouts, rows, length) for rows in (old_logprobs, ref_logprobs, values))
    sampled = align(rollouts, [torch.tensor(rollout.rollout_logprobs) for rollout in rollouts], length)
    advantages, returns = gae(rewards, value, learn, gamma=gamma, gae_lambda=gae_lambda)
    experience = Experience(
        input_ids=input_ids,
        attention_mask=attention_mask,
        response_mask=learn,
        old_logprobs=old,
        rollout_logprobs=sampled,
        ref_logprobs=ref,
        rewards=rewards,
        old_values=value,
        advantages=whiten(advantages, learn) if whiten_advantages else advantages,
        returns=returns,
    )
    return experience, _describe(rollouts, scores, experience, advantages)


def _describe(
    rollouts: Sequence[Rollout],
    scores: Sequence[float | None],
    experience: Experience,
    raw_advantages: Tensor,
) -> dict[str, float]:
    lengths = torch.tensor([float(len(r.response_ids)) for r in rollouts])
    kept = [score for score in scores if score is not None]
    across, within = duplicate_shares([r.response for r in rollouts], [r.prompt.id for r in rollouts])
    metrics = {
        "reward/unscorable_count": float(len(scores) - len(kept)),
        "rollout/length": float(lengths.mean()),
        "rollout/stopped_share": sum(r.finish_reason == "stop" for r in rollouts) / len(rollouts),
        "rollout/tokens_count": float(lengths.sum()),
        "rollout/duplicate_share": across,
        **({"rollout/duplicate_share_within_prompt": within} if within is not None else {}),
    }
    learn, old, ref = experience.response_mask, experience.old_logprobs, experience.ref_logprobs
    if not learn.any():
        return metrics  # nothing was measured: a 0 would steer the KL controller
    values, returns = experience.old_values, experience.returns
    error = masked_mean((returns - values) ** 2, learn)
    spread = masked_mean((returns - masked_mean(returns, learn)) ** 2, learn)
    return {
        **metrics,
        "reward/shaped_score": sum(kept) / len(kept),
        "kl/per_sequence": kl_per_sequence(old, ref, learn),
        "kl/per_token_k3": float(masked_mean(kl_estimate(old, ref, "k3"), learn)),
        **mismatch_metrics(old, experience.rollout_logprobs, learn),
        "critic/value_mean": float(masked_mean(values, learn)),
        "critic/return_mean": float(masked_mean(returns, learn)),
        "critic/explained_variance": float(1 - error / spread) if spread > 0 else 0.0,
        "ppo/advantage_std": float(masked_mean(raw_advantages**2, learn) ** 0.5),
    }


def kl_per_sequence(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> float:
    """Mean over sequences with a valid token of the sum over tokens of logprobs - ref_logprobs (Ziegler 2019)."""
    sums = torch.where(mask, logprobs - ref_logprobs, 0.0).sum(1)
    valid = mask.any(1)
    return float(sums[valid].mean()) if valid.any() else 0.0

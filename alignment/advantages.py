"""How much better than expected: generalised advantage estimation, and baselines from a group of answers."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from alignment.masked import WHITEN_EPS, as_float, zero_masked

GroupKind = Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"]
GRPO_EPS = 1e-6


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
    bootstrap_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman 2015, arXiv 1506.02438, eq. 16).

    delta_t = r_t + gamma * V_next - V_t and A_t = delta_t + gamma * gae_lambda * A_next, where "next" is the next true
    position of the mask: masked tokens in the middle (tool output) are as if they were not there.

    Args:
        rewards, values: (B, T); values[t] is that of the state which emits token t.
        response_mask: (B, T) bool.
        bootstrap_values: (B,) value after the last token, for rows that a limit cut off; 0 for the others. None takes
            0 everywhere: every sequence ends for good.

    Returns:
        advantages and returns = advantages + values, both (B, T) float32 and 0 where masked. Nothing is whitened.
    """
    rewards, values = zero_masked(rewards, response_mask), zero_masked(values, response_mask)
    batch_size, length = rewards.shape
    if bootstrap_values is None:
        next_value = values.new_zeros(batch_size)
    elif bootstrap_values.shape == (batch_size,):
        next_value = bootstrap_values.to(values.dtype)
    else:
        raise ValueError(
            f"bootstrap_values: got shape {tuple(bootstrap_values.shape)}, expected ({batch_size},); "
            "give one value per sequence"
        )
    mask = response_mask.bool()
    next_advantage = torch.zeros_like(next_value)
    advantages = torch.zeros_like(rewards)
    for t in reversed(range(length)):
        valid, value = mask[:, t], values[:, t]
        advantage = rewards[:, t] + gamma * next_value - value + gamma * gae_lambda * next_advantage
        advantages[:, t] = torch.where(valid, advantage, 0.0)
        next_advantage = torch.where(valid, advantage, next_advantage)
        next_value = torch.where(valid, value, next_value)
    return advantages, advantages + values


@torch.no_grad()
def group_advantages(scores: Tensor, group_ids: Tensor | Sequence[Hashable], *, kind: str) -> Tensor:
    """One advantage per sequence, from the scores of the answers to the same prompt.

    | kind | advantage | source |
    |---|---|---|
    | `grpo` | (r - mean) / (std + 1e-6), std unbiased (n - 1) | arXiv 2402.03300 |
    | `dr_grpo` | r - mean | arXiv 2503.20783 |
    | `rloo` | r - mean of the others | arXiv 2402.14740 |
    | `reinforce_pp` | r - batch mean, over the batch's biased std; groups are not read | arXiv 2501.03262 |
    | `reinforce_pp_baseline` | r - mean, over the batch's biased std of that | arXiv 2501.03262 |

    Args:
        scores: (N,), finite.
        group_ids: N ids, a tensor or any hashables; groups may differ in size and need not be adjacent.

    Returns:
        (N,) float32 in the order of `scores`. A group whose scores are all equal gets exactly 0.

    Raises:
        ValueError: unknown kind, shapes that differ, a score that is not finite, or a group of one (for
            `reinforce_pp`, a batch of one), which has nothing to be compared with.
    """
    if kind not in get_args(GroupKind):
        raise ValueError(f"kind: got {kind!r}, expected one of {get_args(GroupKind)}; choose one of them")
    if scores.ndim != 1 or not len(scores) or len(group_ids) != len(scores):
        raise ValueError(
            f"scores, group_ids: got shape {tuple(scores.shape)} and {len(group_ids)} ids, expected (N,) and N, "
            "at least 2; give every score the id of its group"
        )
    scores = as_float(scores)
    if not scores.isfinite().all():
        raise ValueError(
            f"scores: got {scores[~scores.isfinite()].tolist()}, expected finite numbers; "
            "drop what could not be scored"
        )
    index = torch.zeros_like(scores, dtype=torch.long) if kind == "reinforce_pp" else _group_index(group_ids, scores)
    counts = torch.bincount(index).to(scores.dtype)
    if counts.min() < 2:
        raise ValueError(
            f"group_ids: got {int((counts < 2).sum())} groups of one answer, expected at least 2 answers in each for "
            f"{kind}; raise num_samples_per_prompt or drop these prompts"
        )
    centred = _centred(scores, index, counts)
    if kind == "dr_grpo":
        return centred
    if kind == "rloo":
        return centred * (counts / (counts - 1))[index]
    if kind == "grpo":
        std = (torch.zeros_like(counts).index_add(0, index, centred**2) / (counts - 1)).sqrt()
        return centred / (std[index] + GRPO_EPS)
    return centred * torch.rsqrt((centred**2).mean() + WHITEN_EPS)


def _group_index(group_ids: Tensor | Sequence[Hashable], scores: Tensor) -> Tensor:
    """Ids -> (N,) numbers 0 .. groups - 1."""
    if isinstance(group_ids, Tensor):
        return group_ids.to(scores.device).unique(return_inverse=True)[1]
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(group, len(numbers)) for group in group_ids], device=scores.device)


def _centred(scores: Tensor, index: Tensor, counts: Tensor) -> Tensor:
    """Scores minus the mean of their group; exactly 0 throughout a group of equal scores."""
    means = torch.zeros_like(counts).index_add(0, index, scores) / counts
    highest = torch.full_like(counts, -torch.inf).scatter_reduce(0, index, scores, "amax")
    lowest = torch.full_like(counts, torch.inf).scatter_reduce(0, index, scores, "amin")
    # The float mean of equal scores is off by a rounding error; divided by their std, it would become an advantage.
    tolerance = 4 * torch.finfo(scores.dtype).eps * torch.maximum(highest.abs(), lowest.abs())
    constant = highest - lowest <= tolerance
    return torch.where(constant[index], 0.0, scores - means[index])

"""Logits and ids -> log-probabilities of tokens and the entropy of their distributions.

The sampling temperature belongs in every one of them: policy, old policy and reference alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from alignment.masked import as_float, masked_sum

CHUNK_SIZE = 512
"""Positions whose logits exist at one time: 100 MB in float32 with 49,152 words."""


def token_logprobs(logits: Tensor, input_ids: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Log-probability of every token given those before it.

    Args:
        logits: (B, T, V) of any float dtype; `logits[:, t]` predicts token t + 1.
        input_ids: (B, T) int.
        temperature: the one the tokens were sampled at.

    Returns:
        (B, T) float32 (float64 for float64 logits): entry t is log p(input_ids[t] | before), entry 0 is 0. An id
        outside the vocabulary gives NaN, harmless under a mask and loud elsewhere.
    """
    if logits.ndim != 3 or logits.shape[:2] != input_ids.shape:
        raise ValueError(
            f"logits, input_ids: got {tuple(logits.shape)} and {tuple(input_ids.shape)}, "
            "expected (B, T, V) and (B, T); pass the logits of exactly these ids"
        )
    picked = _pick(_log_softmax(logits[:, :-1], temperature), input_ids[:, 1:])
    return torch.nn.functional.pad(picked, (1, 0))


def entropy_from_logits(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of softmax(logits / temperature): (..., V) -> (...), float32 (float64 for float64 logits)."""
    return _entropy(_log_softmax(logits, temperature))


def selected_logprobs(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    *,
    temperature: float = 1.0,
    chunk_size: int = CHUNK_SIZE,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`token_logprobs` at chosen positions without ever holding the logits of a batch.

    Args:
        hidden: (N, d), the states that predict `targets`.
        head: (n, d) -> (n, V).
        targets: (N,) token ids.
        chunk_size: positions whose logits exist at one time. More than one chunk is computed again in the backward
            pass; a single one is kept for it.

    Returns:
        (N,) log-probabilities and, when asked for, (N,) entropies; float32 (float64 for float64 logits).
    """
    if hidden.ndim != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden, targets: got {tuple(hidden.shape)} and {tuple(targets.shape)}, expected (N, d) and (N,); "
            "select the positions before the call"
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size: got {chunk_size}, expected at least 1; {CHUNK_SIZE} is a fair start")
    if not len(targets):
        # Still a function of `hidden` and the head: a micro-batch without a response keeps a whole backward pass.
        nothing = as_float(head(hidden)).sum(-1)
        return nothing, nothing if with_entropy else None

    def one_chunk(states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        if not with_entropy:
            return _picked_logprobs(head(states), ids, temperature), None
        logprobs = _log_softmax(head(states), temperature)
        return _pick(logprobs, ids), _entropy(logprobs)

    results = []
    recompute = torch.is_grad_enabled() and len(targets) > chunk_size
    for states, ids in zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True):
        if recompute:
            results.append(checkpoint(one_chunk, states, ids, use_reentrant=False, preserve_rng_state=False))
        else:
            results.append(one_chunk(states, ids))
    picked = torch.cat([logprobs for logprobs, _ in results])
    return picked, torch.cat([entropy for _, entropy in results]) if with_entropy else None


def sequence_logps(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Log-probability of each whole response: the (B,) sums of (B, T) token log-probabilities under the mask."""
    return masked_sum(logprobs, mask, dim=-1)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(_scaled(logits, temperature), dim=-1)


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, expected above 0; use 1.0 for the model's own distribution")
    return as_float(logits) if temperature == 1 else as_float(logits) / temperature


def _picked_logprobs(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """(n, V) and (n,) -> (n,)."""
    picked: Tensor = _PickedLogprob.apply(_scaled(logits, temperature), ids)
    return picked


class _PickedLogprob(torch.autograd.Function):
    """log softmax(logits)[id] that keeps the logits for the backward pass and no other matrix of V columns.

    The gradient of the picked entry is one_hot(id) - softmax(logits).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> Tensor:
        norm = torch.logsumexp(logits, dim=-1)
        ctx.save_for_backward(logits, ids, norm)
        return _pick(logits, ids) - norm

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, ids, norm = ctx.saved_tensors
        known = (ids >= 0) & (ids < logits.shape[-1])
        grad = torch.where(known, grad, 0).unsqueeze(-1)
        result = (logits - norm.unsqueeze(-1)).exp_().mul_(-grad)
        return result.scatter_add_(-1, torch.where(known, ids, 0).long().unsqueeze(-1), grad), None


def _pick(logprobs: Tensor, ids: Tensor) -> Tensor:
    """(..., V) and (...) -> (...); NaN for an id outside 0..V-1."""
    known = (ids >= 0) & (ids < logprobs.shape[-1])
    picked = logprobs.gather(-1, torch.where(known, ids, 0).long().unsqueeze(-1)).squeeze(-1)
    return torch.where(known, picked, torch.nan)


def _entropy(logprobs: Tensor) -> Tensor:
    # A token of probability 0 has log -inf and contributes 0; 0 * -inf would be NaN, in the gradient as well.
    return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)

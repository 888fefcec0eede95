"""What is asked of a model: log-probabilities of responses, values of states, scores of sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from alignment.logprobs import selected_logprobs
from alignment.models import CausalModel, HfModel


def _run(model: CausalModel, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if isinstance(model, HfModel):
        return model.run(function, *args, **kwargs)
    return function(model, *args, **kwargs)


def response_logprobs(
    model: CausalModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_mask: Tensor,
    *,
    temperature: float,
    with_entropy: bool = False,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of the response tokens: (B, T) float32, 0 elsewhere; with the entropy alike when asked.

    The head runs on the hidden states before response tokens only, in chunks: prompt and padding cost no logits.
    `noise`: (B, T, d) for the embeddings.
    """
    result: tuple[Tensor, Tensor | None] = _run(
        model,
        _response_logprobs,
        input_ids,
        attention_mask,
        response_mask,
        temperature=temperature,
        with_entropy=with_entropy,
        noise=noise,
    )
    return result


def _response_logprobs(
    model: CausalModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_mask: Tensor,
    *,
    temperature: float,
    with_entropy: bool,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    wanted = response_mask[:, 1:]
    hidden = model.hidden(input_ids, attention_mask, noise)[:, :-1][wanted]
    targets = input_ids[:, 1:][wanted]
    picked, entropy = selected_logprobs(
        hidden, model.head, targets, temperature=temperature, with_entropy=with_entropy
    )
    return _place(picked, response_mask), None if entropy is None else _place(entropy, response_mask)


def _place(picked: Tensor, response_mask: Tensor) -> Tensor:
    """Put (N,) numbers back at the N true positions of (B, T); the first column is never a response."""
    full = torch.zeros(response_mask.shape, dtype=torch.float32, device=picked.device)
    body = response_mask.clone()
    body[:, 0] = False
    return full.masked_scatter(body, picked.float())


def response_values(model: CausalModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Critic values (B, T) float32: entry t is the value of the state that emits token t, entry 0 is 0."""
    values: Tensor = _run(model, _response_values, input_ids, attention_mask)
    return values


def _response_values(model: CausalModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    hidden = model.hidden(input_ids, attention_mask)[:, :-1]
    values = model.head(hidden).squeeze(-1).float()
    return torch.nn.functional.pad(values, (1, 0))


def sequence_scores(model: CausalModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Reward-model scores (B,) float32, read at the last attended token whichever side is padded."""
    scores: Tensor = _run(model, _sequence_scores, input_ids, attention_mask)
    return scores


def _sequence_scores(model: CausalModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    hidden = model.hidden(input_ids, attention_mask)
    last = (attention_mask.long() * torch.arange(attention_mask.shape[1], device=hidden.device)).argmax(-1)
    return model.head(hidden[torch.arange(hidden.shape[0], device=hidden.device), last]).squeeze(-1).float()


def marked_scores(model: CausalModel, input_ids: Tensor, attention_mask: Tensor, marks: Tensor) -> Tensor:
    """Reward-model scores (N,) float32 at the N true positions of `marks` (B, T) bool, row by row."""
    scores: Tensor = _run(model, _marked_scores, input_ids, attention_mask, marks)
    return scores


def _marked_scores(model: CausalModel, input_ids: Tensor, attention_mask: Tensor, marks: Tensor) -> Tensor:
    return model.head(model.hidden(input_ids, attention_mask)[marks]).squeeze(-1).float()


def idle_output(model: CausalModel, device: torch.device | str = "cpu") -> Tensor:
    """A number that depends on every parameter: the least that a rank without a row of its own can compute."""
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
    output: Tensor = _run(model, lambda own: own.head(own.hidden(ids, ids == 0)).float().sum())
    return output


@torch.no_grad()
def run_singly(model: HfModel, sequences: Iterable[Sequence[int]]) -> None:
    """One forward for each sequence of ids, for whoever watches the layers: without padding, without logits."""
    for ids in sequences:
        row = torch.tensor([ids], device=model.device)
        model.hidden(row, torch.ones_like(row))

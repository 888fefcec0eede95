"""What a decoder makes of the last token of each sequence: of rows with padding, or of one tree of tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rewards.layouts import Ids, tree

log = logging.getLogger(__name__)


@torch.inference_mode()
def padded_states(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, T) ids and mask -> (B, d): the state at the last attended token, wherever padding stands.

    The model's own pooling looks for padding ids, which may be the EOS that answers end with.
    """
    mask = attention_mask.long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    hidden: Tensor = model.base_model(
        input_ids=input_ids * mask, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(-1)
    return hidden[torch.arange(len(hidden), device=mask.device), last]


def pad(sequences: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    """Ids (B, T) and mask (B, T) bool of sequences that begin at the left."""
    ids = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.int64)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = True
    return ids, mask


@torch.inference_mode()
def tree_states(model: Any, sequences: Sequence[Ids]) -> Tensor:
    """(B, d): the state at the last token of each sequence, what they begin with in common computed once."""
    ids, positions, paths = tree(sequences)
    seen = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    for path in paths:
        own = torch.tensor(path)
        seen[own.unsqueeze(1), own] = torch.ones(len(path), len(path), dtype=torch.bool).tril()
    hidden: Tensor = model.base_model(
        input_ids=torch.tensor([ids], device=model.device),
        attention_mask=_bias(seen.to(model.device), model.dtype),
        position_ids=torch.tensor([positions], device=model.device),
        use_cache=False,
    ).last_hidden_state
    return hidden[0, [path[-1] for path in paths]]


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, N) bool -> (1, 1, N, N), to be added to attention's products: every kernel takes it, unlike a bool."""
    nothing = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return nothing.masked_fill(~seen, torch.finfo(dtype).min)[None, None]


def pays(sequences: Sequence[Ids], hidden_size: int) -> bool:
    """Whether a tree of these sequences is less work than padded rows.

    A layer of the usual shape has 12 d^2 weights, 24 d^2 operations a token; attention over n tokens takes 4 n d a
    token, at about half of the rate.
    """

    def work(tokens: int, width: int) -> float:
        return tokens * (1 + width / (3 * hidden_size))

    longest, shared = max(map(len, sequences)), len(tree(sequences)[0])
    return work(shared, shared) < work(len(sequences) * longest, longest)


def takes_trees(model: Any) -> bool:
    """Whether the states of sequences in a tree are those of each alone.

    They are not where a layer carries a state along the row, reads positions from the row, or looks back a limited
    way.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None):
        return False
    draw = torch.Generator().manual_seed(0)
    start, first, second = (torch.randint(config.vocab_size, (n,), generator=draw).tolist() for n in (9, 13, 6))
    sequences = [start + first, start + second, second + start, start]
    try:
        together = tree_states(model, sequences).float()
    except Exception as refusal:  # of an architecture that wants another mask
        log.info("prefixes are not shared: %s", type(refusal).__name__)
        return False
    alone = [padded_states(model, *(part.to(model.device) for part in pad([ids]))) for ids in sequences]
    own = torch.cat(alone).float()
    # Several times what rounding does through thirty layers.
    most = 1e-3 if model.dtype == torch.float32 else 0.1
    return bool(((together - own).norm(dim=-1) <= most * own.norm(dim=-1)).all())

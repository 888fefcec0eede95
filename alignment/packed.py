"""Lay a padded batch's real tokens end to end, run the backbone on them, and put its states back.

Positions begin at 0 again in every sequence, and there is no attention mask: from positions that begin again
transformers (and flash-attn's varlen kernels) know where a sequence ends, and let none see another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from alignment.packing import Layout, computed_tokens, pack

BatchLayout = Literal["auto", "padded", "packed"]
"""What a config asks for; `auto` packs where it pays and the architecture allows it."""


def packed_hidden(
    backbone: Callable[..., Any],
    input_ids: Tensor,
    attention_mask: Tensor,
    layout: Layout,
    noise: Tensor | None = None,
) -> Tensor:
    """Last hidden states of a backbone over rows that share their padding's place.

    Args:
        backbone: takes `input_ids` and `position_ids`, (R, W) each, and `noise` (R, W, d) where there is some.
        input_ids: (B, T), anything where the mask is false.
        attention_mask: (B, T) bool, real tokens; padding may stand on either side.
        layout: `packed` or `one_row`.
        noise: (B, T, d) for the embeddings of the real tokens.

    Returns:
        (B, T, d), zeros at padding.
    """
    real = attention_mask.bool()
    lengths: list[int] = real.sum(1).tolist()
    width = sum(lengths) if layout == "one_row" else max(lengths)
    rows = pack(lengths, width)
    starts, used = [0] * len(lengths), [0] * len(rows)
    for number, row in enumerate(rows):
        for i in row:
            starts[i] = number * width + used[number]
            used[number] += lengths[i]
    device = input_ids.device
    within = (real.long().cumsum(1) - 1)[real]
    slots = torch.tensor(starts, device=device).unsqueeze(1).expand_as(real)[real] + within
    # What is left of a row is a sequence of its own, which nothing reads.
    rest = torch.arange(width, device=device) - torch.tensor(used, device=device).unsqueeze(1)
    places = rest.clamp(min=0).flatten().scatter(0, slots, within)
    ids = torch.zeros_like(places).scatter(0, slots, input_ids[real].long())
    shape = (len(rows), width)
    extra = {}
    if noise is not None:
        nothing = noise.new_zeros(len(places), noise.shape[-1])
        extra["noise"] = nothing.index_copy(0, slots, noise[real]).view(*shape, -1)
    states: Tensor = backbone(
        input_ids=ids.view(shape), attention_mask=None, position_ids=places.view(shape), use_cache=False, **extra
    ).last_hidden_state
    picked = states.flatten(0, 1)[slots]
    return picked.new_zeros(*real.shape, picked.shape[-1]).masked_scatter(real.unsqueeze(-1), picked)


def saves_tokens(attention_mask: Tensor, layout: Layout) -> bool:
    """Whether this layout computes fewer tokens than the padded one, and there is one to compute."""
    lengths: list[int] = attention_mask.sum(1).tolist()
    return 0 < computed_tokens(lengths, layout) < attention_mask.numel()


@torch.no_grad()
def packing_errors(
    backbone: Callable[..., Any], layout: Layout, *, vocab_size: int, device: torch.device
) -> tuple[float, float]:
    """What is wrong with a backbone's packed states, as shares of their size.

    Layers that carry a state along the row (recurrent or convolutional ones), or that read where a token stands from
    the row instead of its position, show up here whatever the architecture's name says.

    Returns:
        How much a sequence's states change when the others of its row do: 0, of the size of rounding where a kernel
        sorts its work by content (mixtures of experts). And how much they differ from those of the sequence alone: as
        much as rounding does in another shape.
    """
    lengths = (24, 9, 11)
    # In either layout: the sequence that ends a row, and the one in front of it, which it must not see.
    last, before = 1, 2
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (len(lengths), max(lengths)), generator=generator).to(device)
    mask = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device).unsqueeze(1)
    other = ids.clone()
    other[before] = ids[before].flip(0)
    own, beside_other = (packed_hidden(backbone, x, mask, layout)[last, : lengths[last]].float() for x in (ids, other))
    alone = backbone(input_ids=ids[last : last + 1, : lengths[last]], use_cache=False).last_hidden_state[0].float()
    return float((own - beside_other).norm() / own.norm()), float((own - alone).norm() / own.norm())


def choose_layout(layout: BatchLayout, model: Any, path: str) -> Layout:
    """The layout that a loaded model's forwards will have. `auto` packs where it pays and the architecture allows it.

    Raises:
        ValueError: packing is asked for, and sequences that share a row would see each other.
    """
    if layout == "padded":
        return "padded"
    packed: Layout = "one_row" if model.config._attn_implementation == "flash_attention_2" else "packed"
    vocab_size = model.config.get_text_config().vocab_size
    seen, changed = packing_errors(model.base_model, packed, vocab_size=vocab_size, device=model.device)
    # Several times what rounding does: 1e-6 and 0.02 through the thirty layers of SmolLM2.
    most_seen, most_changed = (1e-5, 1e-3) if model.dtype == torch.float32 else (0.005, 0.1)
    if seen <= most_seen and changed <= most_changed:
        return packed
    if layout == "packed":
        raise ValueError(
            f"model.batch_layout: got packed with {path!r}, whose states change by {max(seen, changed):.2%} when "
            "sequences share a row, expected an architecture whose layers look at other tokens by attention alone; "
            "set it to auto, which pads there"
        )
    return "padded"

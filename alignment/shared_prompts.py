"""Several answers to one prompt in one forward that computes the prompt once, with gradients.

A group lies in a row as its prompt and, behind it, its answers one after the other. An answer's positions go on from
the prompt's, and its tokens see the prompt and what stands before them in the answer, none of the other answers. Small
groups share a row, where none sees another. All of it is said by positions and a mask: attention that takes a mask of
its own computes it, SDPA among them; layers that carry a state along the row do not, see `shares_prompts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from alignment.adapters.virtual_tokens import active_virtual_tokens
from alignment.logprobs import selected_logprobs
from alignment.models import CausalModel, HfModel
from alignment.packing import computed_tokens, pack

Ids = Sequence[int]
Group = tuple[Ids, Sequence[Ids]]
"""Ids of a prompt, and of its answers."""


@dataclass(frozen=True, slots=True)
class SharedRows:
    """Groups laid out in R rows of W tokens; N tokens of answers in the order of groups, answers, tokens."""

    input_ids: Tensor
    """(R, W)."""
    position_ids: Tensor
    """(R, W)."""
    owner: Tensor
    """(R, W) the group of a token, -1 for padding."""
    branch: Tensor
    """(R, W) the answer of a token, 0 for a prompt."""
    before: Tensor
    """(N,) for each token of an answer where in the flat rows the token before it stands, whose state predicts it."""
    targets: Tensor
    """(N,) ids."""

    def visible(self) -> Tensor:
        """(R, 1, W, W) bool: which tokens (last axis) a token sees. Padding is a group of its own, so that no
        row is empty."""
        width = self.input_ids.shape[1]
        causal = torch.ones(width, width, dtype=torch.bool, device=self.owner.device).tril()
        same_group = self.owner.unsqueeze(2) == self.owner.unsqueeze(1)
        of_prompt = (self.branch == 0).unsqueeze(1)
        same_answer = self.branch.unsqueeze(2) == self.branch.unsqueeze(1)
        return (causal & same_group & (of_prompt | same_answer)).unsqueeze(1)


def group_length(group: Group) -> int:
    """Tokens that a group takes in a row."""
    prompt, answers = group
    return len(prompt) + sum(map(len, answers))


def shared_rows(groups: Sequence[Group], device: torch.device | str = "cpu") -> SharedRows:
    """Lay groups out in rows as long as the longest; a prompt has one token at least."""
    lengths = [group_length(group) for group in groups]
    width = max(lengths)
    rows = pack(lengths, width)
    starts = [0] * len(groups)
    for number, row in enumerate(rows):
        for i, offset in zip(row, accumulate((lengths[i] for i in row), initial=0), strict=False):
            starts[i] = number * width + offset
    size = len(rows) * width
    ids, places, branch = [0] * size, [0] * size, [0] * size
    owner = [-1] * size
    before: list[int] = []
    targets: list[int] = []
    for i, (prompt, answers) in enumerate(groups):
        at, last = starts[i], starts[i] + len(prompt) - 1
        ids[at : last + 1], places[at : last + 1] = prompt, range(len(prompt))
        owner[at : at + lengths[i]] = [i] * lengths[i]
        at = last + 1
        for number, answer in enumerate(answers, start=1):
            end = at + len(answer)
            ids[at:end], places[at:end] = answer, range(len(prompt), len(prompt) + len(answer))
            branch[at:end] = [number] * len(answer)
            before += [last, *range(at, end - 1)] if answer else []
            targets += answer
            at = end
    shape = (len(rows), width)

    def matrix(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, device=device).view(shape)

    flat = (torch.tensor(part, dtype=torch.int64, device=device) for part in (before, targets))
    return SharedRows(matrix(ids), matrix(places), matrix(owner), matrix(branch), *flat)


def shared_logprobs(model: CausalModel, groups: Sequence[Group], device: torch.device | str = "cpu") -> list[Tensor]:
    """Log-probabilities of the tokens of every answer, (A,) float32 each, in the order of groups and answers: those of
    `response_logprobs`, up to rounding."""
    rows = shared_rows(groups, device)
    assert isinstance(model, HfModel)
    picked: Tensor = model.run(_logprobs, rows)
    return list(picked.float().split([len(answer) for _, answers in groups for answer in answers]))


def _logprobs(model: HfModel, rows: SharedRows) -> Tensor:
    visible = rows.visible()
    dtype = model.head_weight.dtype
    bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    bias.masked_fill_(~visible, torch.finfo(dtype).min)
    states = model.model.base_model(
        input_ids=rows.input_ids, attention_mask=bias, position_ids=rows.position_ids, use_cache=False
    ).last_hidden_state
    picked, _ = selected_logprobs(states.flatten(0, 1)[rows.before], model.head, rows.targets)
    return picked


def saved_tokens(groups: Sequence[Group]) -> float:
    """Share of the tokens of padded rows, one per answer, that is not computed; below 0 where padding costs more."""
    apart = [len(prompt) + len(answer) for prompt, answers in groups for answer in answers]
    together = computed_tokens([group_length(group) for group in groups], "packed")
    return 1 - together / computed_tokens(apart, "padded")


@torch.no_grad()
def shares_prompts(model: HfModel) -> bool:
    """Whether answers that share a prompt have the log-probabilities that each has alone. They have not where a layer
    carries a state along the row, reads positions from it, or looks back a limited way; nor behind virtual tokens."""
    if active_virtual_tokens(model.model) is not None:
        return False
    config = model.model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None):
        return False
    if getattr(config, "_attn_implementation", None) not in ("sdpa", "eager"):
        return False
    draw = torch.Generator().manual_seed(0)
    prompt, first, second = (torch.randint(config.vocab_size, (n,), generator=draw).tolist() for n in (9, 13, 6))
    together = shared_logprobs(model, [(prompt, [first, second]), (second, [first])], model.device)
    alone = [
        shared_logprobs(model, [group], model.device)[0]
        for group in ((prompt, [first]), (prompt, [second]), (second, [first]))
    ]
    most = 1e-3 if model.model.dtype == torch.float32 else 0.1
    return all(bool((a - b).norm() <= most * b.norm()) for a, b in zip(together, alone, strict=True))

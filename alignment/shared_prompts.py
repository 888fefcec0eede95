"""Several answers to one prompt in one forward that computes the prompt once, with gradients.

A group lies in a row as its prompt and, behind it, its answers one after the other. An answer's positions go on from
the prompt's, and its tokens see the prompt and what stands before them in the answer, none of the other answers.
Groups share a row, where none sees another, and what all their prompts begin with (the system prompt of a template)
stands once at the beginning of the row. All of it is said by positions and a mask: attention that takes a mask of its
own computes it, SDPA among them; layers that carry a state along the row do not, see `shares_prompts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from alignment.adapters.virtual_tokens import active_virtual_tokens
from alignment.distributed import balanced_parts
from alignment.logprobs import selected_logprobs
from alignment.models import CausalModel, HfModel
from alignment.packing import computed_tokens

Ids = Sequence[int]
Group = tuple[Ids, Sequence[Ids]]
"""Ids of a prompt, and of its answers."""
MASKED_ATTENTION = ("sdpa", "eager")
"""Implementations that take a mask of their caller's."""
EVERYONE, NOBODY = -2, -1
"""Owners of what all groups of a row begin with, and of padding."""


@dataclass(frozen=True, slots=True)
class SharedRows:
    """Groups laid out in R rows of W tokens; N tokens of answers in the order of groups, answers, tokens."""

    input_ids: Tensor
    """(R, W)."""
    position_ids: Tensor
    """(R, W)."""
    owner: Tensor
    """(R, W) the group of a token, EVERYONE for what groups begin with in common, NOBODY for padding."""
    branch: Tensor
    """(R, W) the answer of a token, 0 for a prompt."""
    before: Tensor
    """(N,) for each token of an answer where in the flat rows the token before it stands, whose state predicts it."""
    targets: Tensor
    """(N,) ids."""

    def visible(self) -> Tensor:
        """(R, 1, W, W) bool: which tokens (last axis) a token sees. Padding sees itself, so that no row is empty."""
        width = self.input_ids.shape[1]
        causal = torch.ones(width, width, dtype=torch.bool, device=self.owner.device).tril()
        same_group = self.owner.unsqueeze(2) == self.owner.unsqueeze(1)
        of_prompt = (self.branch == 0).unsqueeze(1)
        same_answer = self.branch.unsqueeze(2) == self.branch.unsqueeze(1)
        of_all = (self.owner == EVERYONE).unsqueeze(1)
        return (causal & (of_all | (same_group & (of_prompt | same_answer)))).unsqueeze(1)


def group_length(group: Group) -> int:
    """Tokens that a group takes in a row."""
    prompt, answers = group
    return len(prompt) + sum(map(len, answers))


def by_prompt(answers: Sequence[tuple[Ids, Ids]]) -> list[list[int]]:
    """Places of (prompt, answer) that have the same prompt, in the order in which prompts come first."""
    places: dict[tuple[int, ...], list[int]] = {}
    for i, (prompt, _) in enumerate(answers):
        places.setdefault(tuple(prompt), []).append(i)
    return list(places.values())


def common_length(prompts: Sequence[Ids]) -> int:
    """How many tokens all of them begin with in common."""
    ordered = sorted(tuple(prompt) for prompt in prompts)
    first, last = ordered[0], ordered[-1]  # what these two share all between them share
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def cheapest_rows(lengths: Sequence[int], common: int, layers: int) -> list[list[int]]:
    """Share groups out to as many rows as cost the least.

    Args:
        lengths: of each group, without the `common` tokens that every row begins with.
        layers: in a row of so many tokens attention, which looks at all pairs of them, costs as much as the rest.
    """

    def cost(rows: list[list[int]]) -> int:
        width = common + max(sum(lengths[i] for i in row) for row in rows)
        return len(rows) * width * (layers + width)

    return min((balanced_parts(lengths, count) for count in range(1, len(lengths) + 1)), key=cost)


def shared_rows(groups: Sequence[Group], device: torch.device | str = "cpu", *, layers: int = 0) -> SharedRows:
    """Lay groups out, each prompt of one token at least. `layers`: as for `cheapest_rows`."""
    common = common_length([prompt for prompt, _ in groups])
    lengths = [group_length(group) - common for group in groups]
    rows = cheapest_rows(lengths, common, layers)
    width = common + max(sum(lengths[i] for i in row) for row in rows)
    size = len(rows) * width
    ids, places, branch, owner = [0] * size, [0] * size, [0] * size, [NOBODY] * size
    before: list[list[int]] = [[] for _ in groups]
    for number, row in enumerate(rows):
        begin = number * width
        at = begin + common
        ids[begin:at], places[begin:at] = groups[row[0]][0][:common], range(common)
        owner[begin:at] = [EVERYONE] * common
        for i in row:
            prompt, answers = groups[i]
            owner[at : at + lengths[i]] = [i] * lengths[i]
            end = at + len(prompt) - common
            ids[at:end], places[at:end] = prompt[common:], range(common, len(prompt))
            last = end - 1 if end > at else begin + common - 1
            for answer_number, answer in enumerate(answers, start=1):
                at, end = end, end + len(answer)
                ids[at:end], places[at:end] = answer, range(len(prompt), len(prompt) + len(answer))
                branch[at:end] = [answer_number] * len(answer)
                before[i] += [last, *range(at, end - 1)] if answer else []
            at = end
    targets = [token for _, answers in groups for answer in answers for token in answer]
    shape = (len(rows), width)

    def matrix(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, device=device).view(shape)

    flat = (torch.tensor(part, dtype=torch.int64, device=device) for part in ([*chain(*before)], targets))
    return SharedRows(matrix(ids), matrix(places), matrix(owner), matrix(branch), *flat)


def shared_logprobs(model: CausalModel, groups: Sequence[Group], device: torch.device | str = "cpu") -> list[Tensor]:
    """Log-probabilities of the tokens of every answer, (A,) float32 each, in the order of groups and answers: those of
    `response_logprobs`, up to rounding."""
    assert isinstance(model, HfModel)
    # A layer's matrices take 24 d^2 operations a token, attention over W of them 4 W d at half the speed.
    rows = shared_rows(groups, device, layers=3 * model.model.config.get_text_config().hidden_size)
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
    together = shared_rows(groups).input_ids.numel()
    return 1 - together / computed_tokens(apart, "padded")


def sees_all(config: Any) -> bool:
    """Whether every layer's attention reaches back to the first token, as far as a config of transformers tells."""
    own = config.get_text_config()
    kinds = set(getattr(own, "layer_types", None) or ["full_attention"])
    return kinds == {"full_attention"} and not getattr(own, "sliding_window", None)


@torch.no_grad()
def shares_prompts(model: HfModel) -> bool:
    """Whether answers that share a prompt have the log-probabilities that each has alone. They have not where a layer
    carries a state along the row, reads positions from it, or looks back a limited way; nor behind virtual tokens."""
    if active_virtual_tokens(model.model) is not None:
        return False
    config = model.model.config.get_text_config()
    if not sees_all(config) or getattr(config, "_attn_implementation", None) not in MASKED_ATTENTION:
        return False
    draw = torch.Generator().manual_seed(0)
    prompt, first, second = (torch.randint(config.vocab_size, (n,), generator=draw).tolist() for n in (9, 13, 6))
    other = prompt[:4] + second
    together = shared_logprobs(model, [(prompt, [first, second]), (other, [first])], model.device)
    alone = [
        shared_logprobs(model, [group], model.device)[0]
        for group in ((prompt, [first]), (prompt, [second]), (other, [first]))
    ]
    most = 1e-3 if model.model.dtype == torch.float32 else 0.1
    return all(bool((a - b).norm() <= most * b.norm()) for a, b in zip(together, alone, strict=True))

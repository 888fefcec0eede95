"""How likely a model finds each of many short answers to one prompt, such as titles to choose from.

Every answer ends with its end token, so one that begins like another is not the likelier for being shorter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alignment.data.chat import Messages, encode_answer
from alignment.learners.answers import answer_logps
from alignment.models import HfModel
from alignment.packing import MicroBatchLimit
from alignment.shared_prompts import Group, Ids, shared_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROW_TOKENS = 320
"""Of a forward: a longer row spends more on attention between answers that do not see each other than it saves by
computing the prompt less often."""


def encode_candidates(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    texts: Sequence[str],
    *,
    eos_ids: frozenset[int] | None = None,
) -> Group:
    """Ids of a conversation and of each text that may answer it, as in a preference pair: end tokens included."""
    encoded = [encode_answer(tokenizer, messages, text, eos_ids=eos_ids) for text in texts]
    return encoded[0][0], [answer for _, answer in encoded]


@torch.no_grad()
def candidate_logps(
    model: HfModel,
    group: Group,
    *,
    share_prompt: bool,
    row_tokens: int = ROW_TOKENS,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Log-probability of each answer behind the prompt, summed over its tokens.

    Args:
        share_prompt: compute the prompt once for several answers. For models that `shares_prompts` says yes of.
        row_tokens: tokens of a forward; an answer that is longer with its prompt has one of its own.

    Returns:
        (N,) float32 on the CPU, in the order of the answers.
    """
    prompt, answers = group
    if not share_prompt:
        apart = [(tuple(prompt), tuple(answer)) for answer in answers]
        return torch.tensor(answer_logps(model, apart, limit=MicroBatchLimit(tokens=row_tokens), device=device))
    rows = [shared_logprobs(model, [(prompt, part)], device) for part in _rows(len(prompt), answers, row_tokens)]
    return torch.stack([logprobs.sum() for row in rows for logprobs in row]).cpu()


def implicit_rewards(logps: Tensor, ref_logps: Tensor, *, beta: float) -> Tensor:
    """beta * (log pi(y|x) - log pi_ref(y|x)): what DPO takes for the reward of an answer, up to a number that all
    answers to a prompt share (Rafailov 2023, eq. 5). Any beta > 0 orders candidates alike."""
    return beta * (logps - ref_logps)


def _rows(prompt_length: int, answers: Sequence[Ids], row_tokens: int) -> list[list[Ids]]:
    """Answers in order, as many together as fit behind the prompt, one at least."""
    rows: list[list[Ids]] = []
    room = 0
    for answer in answers:
        if not rows or len(answer) > room:
            rows.append([])
            room = row_tokens - prompt_length
        rows[-1].append(answer)
        room -= len(answer)
    return rows

"""Prompts of an online run: loaded, checked, split, and dealt out by step."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from alignment.config import PromptDataConfig
from alignment.data.chat import check_messages, encode_prompt
from alignment.data.sources import Row, column, read_rows
from alignment.data.split import Split, digest, hold_out
from alignment.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PromptSet = Split[Prompt]


def load_prompts(config: PromptDataConfig, tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    """Read, render, drop duplicates and hold out. `counts` has rows, duplicates, too_long.

    Raises:
        ValueError: a row without a prompt, or one over the limit (`file:line: reason`); no prompt left to train on.
    """
    counts = {"rows": 0, "duplicates": 0, "too_long": 0}
    prompts: dict[str, Prompt] = {}
    for row in read_rows(config.source):
        counts["rows"] += 1
        prompt = _prompt(row, config, tokenizer)
        if prompt.id in prompts:
            counts["duplicates"] += 1
        elif len(prompt.prompt_ids) <= config.max_prompt_tokens:
            prompts[prompt.id] = prompt
        elif config.on_long_prompt == "skip":
            counts["too_long"] += 1
        else:
            raise ValueError(
                f"{row.where}: got a prompt of {len(prompt.prompt_ids)} tokens, expected at most "
                f"{config.max_prompt_tokens}; raise data.max_prompt_tokens or set data.on_long_prompt to skip"
            )
    return hold_out(list(prompts.values()), config.held_out, group=lambda p: p.id, counts=counts, what="prompts")


def make_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], columns: Mapping[str, Any] | None = None
) -> Prompt:
    """One prompt from a conversation that waits for an answer."""
    ids = encode_prompt(tokenizer, messages)
    return Prompt(id=prompt_id(messages), messages=tuple(messages), prompt_ids=tuple(ids), columns=columns or {})


def prompt_id(messages: Sequence[Mapping[str, str]]) -> str:
    """16 hex digits that depend on roles and texts alone."""
    return digest(json.dumps([[m["role"], m["content"]] for m in messages], ensure_ascii=False))


def prompts_for_step(
    prompts: Sequence[Prompt], step: int, *, batch_size: int, seed: int, key: str = "ppo.rollout_batch_size"
) -> list[Prompt]:
    """The prompts of one step: a pure function of its arguments, so that a resumed run needs no state.

    Every epoch is a seeded permutation; a step that crosses the border takes the rest of one and the beginning of
    the next, so nothing is skipped, and no prompt comes twice in one step.

    Args:
        step: from 0.
        key: of the config, that says how many.

    Raises:
        ValueError: a batch larger than the number of prompts.
    """
    count = len(prompts)
    if batch_size > count:
        raise ValueError(
            f"{key}: got {batch_size}, expected at most the {count} training prompts; "
            "lower it, lower data.held_out, or add prompts"
        )
    places = range(step * batch_size, (step + 1) * batch_size)
    return [prompts[_epoch_order(count, batch_size, seed, place // count)[place % count]] for place in places]


@lru_cache(maxsize=4)
def _epoch_order(count: int, batch_size: int, seed: int, epoch: int) -> tuple[int, ...]:
    # The head of an epoch shares a batch with the tail of the one before it. Only when an epoch is short can the
    # tail in turn depend on its own head: then the chain is followed from the first epoch on.
    first = max(0, epoch - 1) if count >= 4 * batch_size else 0
    order: list[int] = []
    for current in range(first, epoch + 1):
        before = order
        order = list(range(count))
        random.Random(f"{seed}:{current}").shuffle(order)
        shared = -current * count % batch_size  # places of this epoch in the batch that began in the one before
        if not before or not shared:
            continue
        taken = set(before[count - (batch_size - shared) :])
        spare = (place for place in range(shared, count) if order[place] not in taken)
        for place in [p for p in range(shared) if order[p] in taken]:
            other = next(spare)
            order[place], order[other] = order[other], order[place]
    return tuple(order)


def _prompt(row: Row, config: PromptDataConfig, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    value = column(row, config.prompt_key)
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"{row.where}: got an empty {config.prompt_key!r}, expected text; remove the row")
        value = [{"role": "user", "content": value.strip()}]
    try:
        messages = check_messages(value)
        if (role := messages[-1]["role"]) not in ("user", "tool"):
            raise ValueError(f"got a last message of role {role!r}, expected the user's; drop the answer")
        if config.system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": config.system_prompt}, *messages]
        columns = {name: inner for name, inner in row.values.items() if name != config.prompt_key}
        return replace(make_prompt(tokenizer, messages, columns), where=row.where)
    except ValueError as error:
        raise ValueError(f"{row.where}: {config.prompt_key!r}: {error}") from error

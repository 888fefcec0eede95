"""Preference pairs: two answers to one prompt, tokenised behind the identical prompt ids."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from alignment.config import PreferenceDataConfig
from alignment.data.dialects import canonical
from alignment.data.formats import read_messages
from alignment.data.prompts import prompt_id
from alignment.data.reading import Encoder, Reading, TooLong, collect, number
from alignment.data.sources import Row, column, read_rows
from alignment.data.split import Split, digest
from alignment.types import PreferencePair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PreferenceSet = Split[PreferencePair]


def load_preference_pairs(
    config: PreferenceDataConfig, tokenizer: PreTrainedTokenizerBase, *, eos_ids: frozenset[int] | None = None
) -> PreferenceSet:
    """Read, render, cut, drop duplicates and hold out whole prompts (whole `group`s where rows have that column).

    Accepted rows: text columns `prompt`, `chosen`, `rejected`; message lists in any of them; whole conversations
    in `chosen` and `rejected` without a `prompt`, of which the longest common one is the prompt; `conversations` with
    `chosen` and `rejected` messages; and what `alignment.data.dialects` knows.

    `counts` has rows, duplicates, truncated (pairs with a side cut), contradictory (the same two answers preferred
    both ways), chosen_longer (a length bias shows here); and where there are some prompt_cut (with
    config.cut_prompts), later_turns_dropped (what whole conversations say after the turn in which they part).

    Raises:
        ValueError: `file:line: reason` for an answer that is empty or equals the other, a prompt that leaves no room.
    """
    encoder = Encoder(
        tokenizer=tokenizer,
        eos_ids=eos_ids,
        max_tokens=config.max_tokens,
        system_prompt=config.system_prompt,
        cut_prompts=config.cut_prompts,
    )
    rows = map(canonical, read_rows(config.source))
    return collect(rows, lambda row: read_pair(row, encoder), wanted=config.held_out, told=PAIR_COUNTS, what="pairs")


PAIR_COUNTS = ("truncated", "contradictory", "chosen_longer")


def read_pair(
    row: Row, encoder: Encoder, *, source: str = "", margin_key: str | None = None
) -> Reading[PreferencePair]:
    """One row as a pair. Raises as `load_preference_pairs`, without the place."""
    messages, chosen, rejected, dropped = _read(row, encoder.system_prompt)
    prompt_ids, (chosen_ids, rejected_ids), told = encoder.answers(messages, [chosen, rejected])
    if chosen_ids == rejected_ids:
        raise TooLong(
            f"got two answers with the same first {len(chosen_ids)} tokens, expected different ones within "
            f"data.max_tokens={encoder.max_tokens}; raise it or remove the row"
        )
    margin = 0.0
    if margin_key is not None:
        margin = number(column(row, margin_key), margin_key, low=0.0, high=float("inf"))
    pair = PreferencePair(
        id=_pair_id(messages, chosen, rejected),
        prompt_ids=tuple(prompt_ids),
        chosen_ids=tuple(chosen_ids),
        rejected_ids=tuple(rejected_ids),
        margin=margin,
        source=source,
    )
    longer = len(chosen_ids) > len(rejected_ids)
    return Reading(
        record=pair,
        group=str(row.values.get("group") or prompt_id(messages)),
        opposite=_pair_id(messages, rejected, chosen),
        told=told + ("later_turns_dropped",) * dropped + ("chosen_longer",) * longer,
    )


def encode_pairs(rows: Sequence[dict[str, Any]], encoder: Encoder) -> list[PreferencePair]:
    """Rows of pairs that a run has made itself; those whose answers are the same within the limit are left out."""
    pairs = []
    for place, row in enumerate(rows):
        with contextlib.suppress(TooLong):
            pairs.append(read_pair(Row(row, f"pair {place}"), encoder).record)
    return pairs


def _pair_id(messages: list[dict[str, str]], chosen: str, rejected: str) -> str:
    return digest("\0".join([prompt_id(messages), chosen, rejected]))


def _read(row: Row, system_prompt: str | None) -> tuple[list[dict[str, str]], str, str, bool]:
    """`(messages of the prompt, chosen text, rejected text, whether turns behind them were dropped)`."""
    told_chosen, told_rejected = _turns(column(row, "chosen"), "chosen"), _turns(column(row, "rejected"), "rejected")
    asked, dropped = None, False
    if "conversations" in row.values:
        asked = read_messages(column(row, "conversations"))
        if row.values.get("system"):
            asked = [{"role": "system", "content": str(row.values["system"])}, *asked]
    elif row.values.get("prompt") is not None or len(told_chosen) == 1:
        asked = read_messages(column(row, "prompt"))
    if asked is None:
        messages, chosen, rejected, dropped = common_conversation(told_chosen, told_rejected)
    else:
        messages, chosen, rejected = asked, told_chosen[-1]["content"], told_rejected[-1]["content"]
        if told_chosen[:-1] != told_rejected[:-1]:
            raise ValueError("got chosen and rejected with different prompts, expected one prompt; correct the row")
        if told_chosen[:-1] and messages != told_chosen[:-1]:
            raise ValueError("got a prompt that differs from the beginning of chosen, expected one; drop either")
    if messages[-1]["role"] not in ("user", "tool"):
        raise ValueError(f"got a prompt that ends with role {messages[-1]['role']!r}, expected the user's; correct it")
    if not chosen.strip() or not rejected.strip():
        empty = "chosen" if not chosen.strip() else "rejected"
        raise ValueError(f"got an empty {empty!r}, expected text; remove the row")
    if chosen == rejected:
        raise ValueError("got chosen equal to rejected, expected a preference; remove the row")
    if system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    return messages, chosen, rejected, dropped


def common_conversation(
    chosen: list[dict[str, str]], rejected: list[dict[str, str]]
) -> tuple[list[dict[str, str]], str, str, bool]:
    """Part two conversations that begin alike: their longest common beginning that both answer, the two answers, and
    whether either goes on behind its answer.

    Raises:
        ValueError: they have no such beginning.
    """
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    last = min(len(chosen), len(rejected)) - 1 if same is None else same
    # Where two questions differ, or one conversation ends, the answers before them are what there is to compare.
    answered = [i for i in range(1, last + 1) if chosen[i]["role"] == rejected[i]["role"] == "assistant"]
    if not answered:
        raise ValueError("got chosen and rejected with different prompts, expected one prompt; correct the row")
    at = answered[-1]
    goes_on = max(len(chosen), len(rejected)) > at + 1
    return chosen[:at], chosen[at]["content"], rejected[at]["content"], goes_on


def _turns(value: Any, name: str) -> list[dict[str, str]]:
    """The answer as the last turn, behind what stands before it (nothing, in most forms)."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    messages = read_messages([value] if isinstance(value, Mapping) else value)
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"{name!r}: got a last message of role {messages[-1]['role']!r}, expected the assistant's")
    return messages

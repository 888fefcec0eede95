"""Preference pairs: two answers to one prompt, tokenised behind the identical prompt ids."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from alignment.data.formats import with_system_column
from alignment.data.prompts import prompt_id
from alignment.data.reading import Encoder, Messages, Reading, TooLong, group_of, messages_of, number
from alignment.data.sources import Row, column
from alignment.data.split import digest
from alignment.types import PreferencePair

PAIR_COUNTS = ("truncated", "contradictory", "chosen_longer")


def read_pair(
    row: Row, encoder: Encoder, *, source: str = "", margin_key: str | None = None
) -> Reading[PreferencePair]:
    """One row as a pair.

    Accepted rows: text columns `prompt`, `chosen`, `rejected`; message lists in any of them; whole conversations
    in `chosen` and `rejected`, parted at the longest beginning that they share, or beside a `prompt` that they begin
    with or whose question they come to; `conversations` with `chosen` and `rejected` messages; and what
    `alignment.data.dialects` knows. What stands in `system` comes before a prompt without a system turn.

    `told`: truncated (a side was cut), chosen_longer (a length bias shows here), prompt_cut (with `cut_prompts`),
    later_turns_dropped (what whole conversations say after the turn in which they part).

    Raises:
        ValueError: an answer that is empty or equals the other, a prompt that leaves no room.
    """
    messages, chosen, rejected, dropped = _read(row)
    messages = encoder.with_system(messages)
    encoded = encoder.answers(messages, [chosen, rejected])
    chosen_ids, rejected_ids = encoded.answer_ids
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
        prompt_ids=encoded.prompt_ids,
        chosen_ids=chosen_ids,
        rejected_ids=rejected_ids,
        margin=margin,
        source=source,
    )
    longer = len(chosen_ids) > len(rejected_ids)
    return Reading(
        record=pair,
        group=group_of(row, messages),
        whole_prompt=encoded.whole_prompt,
        opposite=_pair_id(messages, rejected, chosen),
        told=encoded.told + ("later_turns_dropped",) * dropped + ("chosen_longer",) * longer,
    )


def encode_pairs(rows: Sequence[dict[str, Any]], encoder: Encoder) -> list[PreferencePair]:
    """Rows of pairs that a run has made itself; those whose answers are the same within the limit are left out."""
    pairs = []
    for place, row in enumerate(rows):
        with contextlib.suppress(TooLong):
            pairs.append(read_pair(Row(row, f"pair {place}"), encoder).record)
    return pairs


def _pair_id(messages: Messages, chosen: str, rejected: str) -> str:
    return digest("\0".join([prompt_id(messages), chosen, rejected]))


def _read(row: Row) -> tuple[Messages, str, str, bool]:
    """`(messages of the prompt, chosen text, rejected text, whether turns behind them were dropped)`."""
    told_chosen, told_rejected = _turns(column(row, "chosen"), "chosen"), _turns(column(row, "rejected"), "rejected")
    asked, dropped = None, False
    if "conversations" in row.values:
        asked = messages_of(column(row, "conversations"), "conversations")
    elif row.values.get("prompt") is not None or len(told_chosen) == 1:
        asked = messages_of(column(row, "prompt"), "prompt")
    if asked is None:
        messages, chosen, rejected, dropped = common_conversation(told_chosen, told_rejected)
    else:
        messages, chosen, rejected = asked, told_chosen[-1]["content"], told_rejected[-1]["content"]
        begun = _fuller(told_chosen[:-1], told_rejected[:-1])
        if begun is None or len(_without_system(told_chosen)) != len(_without_system(told_rejected)):
            raise ValueError("got chosen and rejected with different prompts, expected one prompt; correct the row")
        fuller = _fuller(asked, begun)
        if fuller is None:
            raise ValueError("got a prompt that differs from the beginning of chosen, expected one; drop either")
        messages = fuller
    messages = with_system_column(row.values, messages)
    if messages[-1]["role"] not in ("user", "tool"):
        raise ValueError(f"got a prompt that ends with role {messages[-1]['role']!r}, expected the user's; correct it")
    if not chosen.strip() or not rejected.strip():
        empty = "chosen" if not chosen.strip() else "rejected"
        raise ValueError(f"got an empty {empty!r}, expected text; remove the row")
    if chosen == rejected:
        raise ValueError("got chosen equal to rejected, expected a preference; remove the row")
    return messages, chosen, rejected, dropped


def _fuller(one: Messages, other: Messages) -> Messages | None:
    """Two tellings of one prompt as the one that tells more: the system turn of either, and the turns of the longer.
    None where they are different prompts: other turns than the last ones of the longer, up to blanks around them."""
    turns, fewer = _without_system(one), _without_system(other)
    if len(fewer) > len(turns):
        turns, fewer = fewer, turns
    systems = [told[:1] for told in (one, other) if told and told[0]["role"] == "system"]
    if _stripped(turns[len(turns) - len(fewer) :]) != _stripped(fewer):
        return None
    if any(_stripped(system) != _stripped(systems[0]) for system in systems):
        return None
    return [*(systems[0] if systems else ()), *turns]


def _without_system(messages: Messages) -> Messages:
    return messages[1:] if messages and messages[0]["role"] == "system" else messages


def _stripped(messages: Messages) -> Messages:
    return [{**message, "content": message["content"].strip()} for message in messages]


def common_conversation(chosen: Messages, rejected: Messages) -> tuple[Messages, str, str, bool]:
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


def _turns(value: Any, name: str) -> Messages:
    """The answer as the last turn, behind what stands before it (nothing, in most forms)."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    messages = messages_of([value] if isinstance(value, Mapping) else value, name)
    if messages[-1]["role"] != "assistant":
        raise ValueError(
            f"{name!r}: got a last message of role {messages[-1]['role']!r}, expected the assistant's; drop what "
            "follows the answer"
        )
    return messages

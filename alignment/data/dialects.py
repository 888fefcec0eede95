"""Columns of other projects' preference data, as the ones that our readers know.

| rows of | are told by | become |
|---|---|---|
| LLaMA-Factory, pairs | `instruction` (`input`, `history`), `chosen`, `rejected`, or two in `output` | a pair |
| LLaMA-Factory, labels | `kto_tag` beside `instruction` and `output`, or `conversations`, or `messages` | a label |
| TRL, labels | `completion` as a list of one message | a label |
| HH | `chosen`, `rejected`: text that begins with a blank line and `Human:` | a pair of conversations |
| logs | `thumbs`: up or down | a label |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from alignment.data.files import Row
from alignment.data.formats import alpaca_prompt, read_messages

_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_LABELS = ("kto_tag", "thumbs")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def canonical(row: Row) -> Row:
    """The row in our columns; one that has them already is left alone.

    Raises:
        ValueError: `file:line: reason` for a cell that cannot be read.
    """
    values = dict(row.values)
    try:
        _read(values)
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from error
    return Row(values, row.where)


def _read(values: dict[str, Any]) -> None:
    label = next((name for name in _LABELS if values.get(name) is not None), None)
    if label is not None and values.get("label") is None:
        values["label"] = values.pop(label)
    paired = values.get("chosen") is not None and values.get("rejected") is not None
    labelled = values.get("label") is not None
    outputs = values.get("output")
    if values.get("instruction") is not None and values.get("prompt") is None:
        if isinstance(outputs, list) and len(outputs) == 2 and not paired:
            values["chosen"], values["rejected"], paired = outputs[0], outputs[1], True
        if paired or labelled:
            values["prompt"] = alpaca_prompt(values)
        if labelled:
            values["completion"] = outputs if values.get("completion") is None else values["completion"]
    if labelled and values.get("prompt") is None:
        _part_conversation(values)
    if isinstance(values.get("completion"), list):
        values["completion"] = _only_answer(values["completion"])
    if paired and all(is_transcript(values[side]) for side in ("chosen", "rejected")):
        values.update({side: read_transcript(values[side]) for side in ("chosen", "rejected")})


def _part_conversation(values: dict[str, Any]) -> None:
    """A labelled conversation is its last answer, behind the rest."""
    name = next((name for name in ("conversations", "messages") if isinstance(values.get(name), list)), None)
    if name is None:
        return
    messages = read_messages(values.pop(name))
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError(f"{name!r}: got no answer at the end, expected one that the label is of; correct the row")
    values["prompt"], values["completion"] = messages[:-1], messages[-1]["content"]


def _only_answer(messages: list[Any]) -> str:
    if len(messages) != 1 or not isinstance(messages[0], Mapping):
        raise ValueError(f"'completion': got {len(messages)} messages, expected one answer; put the others in prompt")
    (answer,) = read_messages(messages)
    if answer["role"] != "assistant":
        raise ValueError(
            f"'completion': got a turn of role {answer['role']!r}, expected the assistant's; correct the row"
        )
    return answer["content"]


def is_transcript(value: Any) -> bool:
    """Whether a text is a whole conversation of Human and Assistant."""
    return isinstance(value, str) and value.startswith("\n\nHuman:")


def read_transcript(text: str) -> list[dict[str, str]]:
    """The turns of a text in which each begins with a blank line and `Human:` or `Assistant:`. Turns in a row of one
    speaker are one."""
    _, *parts = _SPEAKER.split(text)
    messages: list[dict[str, str]] = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        role, content = _ROLES[speaker], said.strip()
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] = f"{messages[-1]['content']}\n\n{content}".strip()
        else:
            messages.append({"role": role, "content": content})
    return messages

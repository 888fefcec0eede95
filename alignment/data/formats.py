"""What a row of supervised data says, whichever of the usual shapes it has: a conversation, or plain text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from alignment.data.chat import check_messages
from alignment.data.files import Row

Values = Mapping[str, Any]

_ROLES = {
    **dict.fromkeys(["human", "user"], "user"),
    **dict.fromkeys(["gpt", "assistant", "chatgpt", "bing", "bard"], "assistant"),
    **dict.fromkeys(["observation", "tool"], "tool"),
    "system": "system",
}


@dataclass(frozen=True, slots=True)
class Lesson:
    """What one row teaches. Without messages and text nothing: nobody answered."""

    messages: tuple[dict[str, str], ...] = ()
    """A conversation that ends with the assistant's turn; empty for a plain text."""
    text: str = ""
    dropped: tuple[str, ...] = ()
    """What was left out of the row: "leading_answers", "trailing_questions"."""


@dataclass(frozen=True, slots=True)
class Format:
    """A shape of rows: the columns that tell it, any one of the sets, and what reads them."""

    columns: tuple[tuple[str, ...], ...]
    read: Callable[[Values], Lesson]

    def fits(self, values: Values) -> bool:
        return any(all(values.get(name) is not None for name in names) for names in self.columns)

    def __str__(self) -> str:
        return " or ".join("+".join(names) for names in self.columns)


def lesson_of(row: Row, format: str) -> Lesson:
    """The lesson of a row of the named format.

    Raises:
        ValueError: `file:line: reason` for a row of another format, or with cells that cannot be learnt from.
    """
    expected = FORMATS[format]
    try:
        if not expected.fits(row.values):
            others = [name for name, other in FORMATS.items() if other.fits(row.values)]
            got = f"a row of format {' or '.join(others)}" if others else f"columns {_filled(row.values)}"
            raise ValueError(
                f"got {got}, expected {expected} with values, as in format {format}; keep one format in a source, or "
                "correct the row"
            )
        return expected.read(row.values)
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from error


def detect_format(row: Row) -> str:
    """The format that the columns of a row tell; `text` only where no other fits.

    Raises:
        ValueError: none fits, or several do.
    """
    fitting = [name for name, format in FORMATS.items() if format.fits(row.values) and name != "text"]
    if not fitting and FORMATS["text"].fits(row.values):
        fitting = ["text"]
    if len(fitting) == 1:
        return fitting[0]
    known = "; ".join(f"{name}: {format}" for name, format in FORMATS.items())
    if fitting:
        raise ValueError(
            f"{row.where}: got columns {_filled(row.values)}, which fit {' and '.join(fitting)}, expected one format "
            f"({known}); set format"
        )
    raise ValueError(
        f"{row.where}: got columns {_filled(row.values)}, expected those of a format ({known}); rename the columns"
    )


def read_messages(value: Any) -> list[dict[str, str]]:
    """Messages from text (one user's turn), from `role` and `content`, or from `from` and `value`.

    Raises:
        ValueError: neither of them, a role not known, content that is no text.
    """
    if isinstance(value, str):
        if not value.strip():
            raise ValueError("got an empty prompt, expected text; remove the row")
        return [{"role": "user", "content": value.strip()}]
    if isinstance(value, list) and all(isinstance(m, Mapping) and {"from", "value"} <= set(m) for m in value):
        value = [{"role": _role(m["from"]), "content": m["value"]} for m in value]
    return check_messages(value)


def _role(name: Any) -> str:
    if not isinstance(name, str) or name not in _ROLES:
        raise ValueError(f"conversations: got a turn from {name!r}, expected one of {sorted(_ROLES)}; correct it")
    return _ROLES[name]


def _filled(values: Values) -> list[str]:
    return [name for name, value in values.items() if value is not None]


def _conversation(messages: list[dict[str, str]]) -> Lesson:
    """The messages from the first that asks to the last that answers."""
    for before, message in zip([None, *messages], messages, strict=False):
        role = message["role"]
        if not message["content"].strip() and role != "tool":
            raise ValueError(f"got an empty turn of role {role!r}, expected text; remove the row")
        if before and before["role"] == role != "tool":
            raise ValueError(f"got two turns in a row of role {role!r}, expected turns that alternate; join them")
    dropped = []
    first = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    if first < len(messages) and messages[first]["role"] == "assistant":
        messages = [*messages[:first], *messages[first + 1 :]]
        dropped.append("leading_answers")
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
    if last + 1 < len(messages):
        dropped.append("trailing_questions")
    return Lesson(messages=tuple(messages[: last + 1]), dropped=tuple(dropped))


def _text_of(values: Values, name: str, *, may_be_empty: bool = False) -> str:
    value = values.get(name)
    if value is None and may_be_empty:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{name!r}: got {type(value).__name__}, expected text; correct the row")
    if not value.strip() and not may_be_empty:
        raise ValueError(f"{name!r}: got an empty cell, expected text; remove the row")
    return value


def _system(values: Values) -> list[dict[str, str]]:
    text = _text_of(values, "system", may_be_empty=True)
    return [{"role": "system", "content": text}] if text.strip() else []


def with_system_column(values: Values, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The conversation behind what a row has in `system`, unless it has a system turn of its own."""
    return messages if messages[0]["role"] == "system" else [*_system(values), *messages]


def alpaca_prompt(values: Values) -> list[dict[str, str]]:
    """The conversation before the answer, out of `instruction`, and `input`, `system` and `history` if there."""
    given = _text_of(values, "input", may_be_empty=True).strip()
    question = _text_of(values, "instruction").strip() + (f"\n\n{given}" if given else "")
    return [*_system(values), *_earlier(values.get("history")), {"role": "user", "content": question}]


def _alpaca(values: Values) -> Lesson:
    return _conversation([*alpaca_prompt(values), {"role": "assistant", "content": _text_of(values, "output")}])


def _earlier(history: Any) -> Iterator[dict[str, str]]:
    """Alpaca's earlier turns: pairs of a question and its answer."""
    if not isinstance(history or [], list):
        raise ValueError(f"'history': got {type(history).__name__}, expected a list of pairs of text; correct the row")
    for pair in history or ():
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ValueError("'history': got something else than pairs of text, expected those; correct the row")
        yield from ({"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True))


def _turns(column: str) -> Callable[[Values], Lesson]:
    def read(values: Values) -> Lesson:
        if not isinstance(values[column], list) or not values[column]:
            got = "an empty list" if values[column] == [] else type(values[column]).__name__
            raise ValueError(f"{column!r}: got {got}, expected a list of turns; correct the row")
        return _conversation(with_system_column(values, read_messages(values[column])))

    return read


def _prompt_completion(values: Values) -> Lesson:
    asked, said = next(names for names in _PAIRS if all(values.get(name) is not None for name in names))
    messages = read_messages(values[asked])
    if (role := messages[-1]["role"]) not in ("user", "tool"):
        raise ValueError(f"{asked!r}: got a last turn of role {role!r}, expected the user's; drop what follows it")
    answer = values[said]
    if isinstance(answer, list):
        return _conversation([*messages, *read_messages(answer)])
    return _conversation([*messages, {"role": "assistant", "content": _text_of(values, said)}])


_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"))
FORMATS: dict[str, Format] = {
    "messages": Format((("messages",),), _turns("messages")),
    "sharegpt": Format((("conversations",),), _turns("conversations")),
    "alpaca": Format((("instruction", "output"),), _alpaca),
    "prompt_completion": Format(_PAIRS, _prompt_completion),
    "text": Format((("text",),), lambda values: Lesson(text=_text_of(values, "text"))),
}
"""By the name that `format` has in the config."""

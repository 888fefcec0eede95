"""From rows to records of a reward model: what all kinds of judgements share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from alignment.data.chat import encode_answer
from alignment.data.formats import read_messages, with_system_column
from alignment.data.prompts import prompt_id
from alignment.data.sources import Row, column
from alignment.data.split import Split, hold_out, own_group
from alignment.judgements import Judgement

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

J = TypeVar("J", bound=Judgement)
Messages = list[dict[str, str]]
LEAST_PROMPT = 16
"""Tokens that a prompt keeps: the end of the question, and what the template puts before an answer."""


class TooLong(ValueError):
    """Within data.max_tokens a row has nothing to judge."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading(Generic[J]):
    """What one row says."""

    record: J
    group: str
    """What a split must keep together."""
    whole_prompt: tuple[int, ...]
    """Ids of the prompt as it was before a cut, which tell whether two rows ask the same."""
    opposite: str | None = None
    """Id of the record that says the contrary."""
    told: tuple[str, ...] = ()
    """What is counted of it."""


def collect(
    rows: Iterable[Row],
    read: Callable[[Row], Reading[J]],
    *,
    wanted: int,
    told: Sequence[str],
    what: str,
    skip_long: bool = False,
    also: Iterable[Row] = (),
) -> Split[J]:
    """Read, drop duplicates and hold out whole groups. `counts` has rows, duplicates, and those named in `told`.

    Args:
        skip_long: leave out rows that are too long, and count them as too_long.
        also: rows to train on alone; those of a group that is held out are left out, and counted as held_out_too.

    Raises:
        ValueError: `file:line: reason`.
    """
    counts: Counter[str] = Counter(dict.fromkeys(["rows", "duplicates", *told], 0))
    records: dict[str, J] = {}
    groups: dict[str, str] = {}
    num_own = 0
    for row, is_own in chain(((row, True) for row in rows), ((row, False) for row in also)):
        counts["rows"] += 1
        try:
            reading = read(row)
        except ValueError as error:
            if skip_long and isinstance(error, TooLong):
                counts["too_long"] += 1
                continue
            text = str(error)
            raise ValueError(text if text.startswith(row.where) else f"{row.where}: {text}") from error
        record = reading.record
        if record.id in records:
            counts["duplicates"] += 1
            continue
        records[record.id], groups[record.id] = record, reading.group
        num_own += is_own
        counts.update(reading.told)
        if reading.opposite in records:
            counts["contradictory"] += 1
    every = list(records.values())
    split = hold_out(every[:num_own], wanted, group=lambda r: groups[r.id], counts=counts, what=what)
    out = {groups[record.id] for record in split.held_out}
    more = [record for record in every[num_own:] if groups[record.id] not in out]
    if left_out := len(every) - num_own - len(more):
        counts["held_out_too"] = left_out
    return Split([*split.train, *more], split.held_out, dict(counts))


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """A prompt and its answers as ids, cut to max_tokens together."""

    prompt_ids: tuple[int, ...]
    answer_ids: list[tuple[int, ...]]
    whole_prompt: tuple[int, ...]
    """The prompt before a cut."""
    told: tuple[str, ...]
    """What is counted: "prompt_cut", "truncated" (an answer was)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoder:
    """Text to ids, as configured."""

    tokenizer: PreTrainedTokenizerBase
    eos_ids: frozenset[int] | None
    max_tokens: int
    system_prompt: str | None
    end_cut: bool = False
    """Whether an answer that is cut ends with the end token all the same, which counts within max_tokens."""
    cut_prompts: bool = False
    """Whether a prompt loses its beginning before an answer loses its end."""

    def messages(self, row: Row, name: str = "prompt") -> Messages:
        """The conversation before the answer, with the row's system prompt, or else the config's."""
        messages = with_system_column(row.values, messages_of(column(row, name), name))
        if (role := messages[-1]["role"]) not in ("user", "tool"):
            raise ValueError(f"got a prompt that ends with role {role!r}, expected the user's; correct it")
        return self.with_system(messages)

    def with_system(self, messages: Messages) -> Messages:
        if self.system_prompt is not None and messages[0]["role"] != "system":
            return [{"role": "system", "content": self.system_prompt}, *messages]
        return messages

    def answers(self, messages: Messages, texts: Sequence[str]) -> Encoded:
        """Of one prompt, the same for all answers. Without `end_cut` a cut answer has no end token: none is invented.

        Raises:
            TooLong: the prompt leaves no room.
        """
        whole: list[int] = []
        found = []
        for text in texts:
            whole, ids = encode_answer(self.tokenizer, messages, text, eos_ids=self.eos_ids)
            found.append(ids)
        longest, prompt_ids = max(map(len, found)), whole
        if self.cut_prompts:
            least = max(1, min(LEAST_PROMPT, self.max_tokens // 4))
            prompt_ids = whole[-max(self.max_tokens - longest, least) :]
        room = self.max_tokens - len(prompt_ids)
        if room < 1:
            raise TooLong(
                f"got a prompt of {len(prompt_ids)} tokens, expected fewer than data.max_tokens={self.max_tokens}, so "
                "that an answer fits behind it; raise data.max_tokens or remove the row"
            )
        kept = [ids[:room] for ids in found]
        if self.end_cut:
            kept = [ids if len(ids) <= room else [*ids[: room - 1], ids[-1]] for ids in found]
        cut = len(prompt_ids) < len(whole)
        return Encoded(
            prompt_ids=tuple(prompt_ids),
            answer_ids=[tuple(ids) for ids in kept],
            whole_prompt=tuple(whole),
            told=("prompt_cut",) * cut + ("truncated",) * (longest > room),
        )


def messages_of(value: Any, name: str) -> Messages:
    """`read_messages` of a cell.

    Raises:
        ValueError: it has neither text nor messages.
    """
    if not isinstance(value, (str, list, tuple)):
        got = "no text (nan)" if value != value else type(value).__name__
        raise ValueError(f"{name!r}: got {got}, expected text or a list of messages; correct the row")
    try:
        return read_messages(value)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from error


def group_of(row: Row, messages: Messages) -> str:
    """What a split must keep together: the rows of one `group`, or else of one prompt."""
    return own_group(row.values) or prompt_id(messages)


def number(value: Any, name: str, *, low: float, high: float) -> float:
    """A number out of a cell: JSON's, or the text of one.

    Raises:
        ValueError: no number, or one outside [low, high].
    """
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = float("nan")
    if isinstance(value, bool):
        found = float(value)
    if not low <= found <= high or found == float("inf"):
        raise ValueError(f"{name!r}: got {value!r}, expected a number from {low:g} to {high:g}; correct the row")
    return found


def text_of(value: Any, name: str) -> str:
    """An answer's text.

    Raises:
        ValueError: something else, or nothing.
    """
    if not isinstance(value, str):
        raise ValueError(f"{name!r}: got {type(value).__name__}, expected text; correct the row")
    if not value.strip():
        raise ValueError(f"got an empty {name!r}, expected text; remove the row")
    return value


def filled(values: Mapping[str, Any]) -> list[str]:
    return [str(name) for name, value in values.items() if value is not None]

"""Supervised examples: rows of several sources, tokenised, held out in part, and dealt out by step."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from alignment.config import SftDataConfig, SftSourceConfig
from alignment.data.chat import encode_conversation, encode_text
from alignment.data.files import Row
from alignment.data.formats import Lesson, detect_format, lesson_of
from alignment.data.mixing import Mixture
from alignment.data.prompts import prompt_id
from alignment.data.sources import read_rows
from alignment.data.split import digest, held_out_groups, own_group
from alignment.data.streaming import ByPlace, Joined, Rows, open_rows
from alignment.types import SftExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_PASSED_OVER = 10_000
"""Rows in a row without an example, while streaming, before the data is refused."""

Examples = ByPlace[SftExample]


class SftData:
    """The examples of a run. `batch` is a pure function of its arguments and the seed."""

    def __init__(
        self,
        parts: Sequence[Examples],
        weights: Sequence[float],
        *,
        held_out: list[SftExample],
        seed: int,
        told: str,
        fingerprint: str,
    ) -> None:
        self.held_out = held_out
        self._parts, self._mixture = parts, Mixture([len(part) for part in parts], weights, seed=seed)
        self._told, self._fingerprint = told, fingerprint

    @property
    def num_examples(self) -> int:
        """To train on."""
        return sum(map(len, self._parts))

    def batch(self, step: int, batch_size: int) -> list[SftExample]:
        """The examples of one step, from 0. With weights the parts are the sources; without there is one part."""
        return [self._parts[part][index] for part, index in self._mixture.batch(step, batch_size)]

    def summary(self) -> str:
        """One line without any text of the data."""
        return f"{self.num_examples:,} train, {len(self.held_out):,} held out ({self._told})"

    def fingerprint(self) -> str:
        """sha256 over what every row teaches and its group, in order, of all sources; not over the tokens."""
        return self._fingerprint


def load_sft_data(
    config: SftDataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    eos_ids: frozenset[int] | None = None,
    seed: int,
) -> SftData:
    """Read every source once, drop what is double, hold out whole groups, and tokenise: now, or with
    `config.streaming` when a batch asks.

    Streaming gives the same batches where every example fits into `max_tokens`. Where one is left without anything
    to learn, in-memory data drops it, and streaming takes the row behind it in the file in its place.

    Raises:
        ValueError: `file:line: reason` for a row that cannot be learnt from; no example left to train on.
    """
    encoder = Encoder(config, tokenizer, eos_ids)
    catalogue = Catalogue()
    opened = [open_rows(source) if config.streaming else read_rows(source) for source in config.sources]
    formats = [
        catalogue.add(number, source, rows, encoder)
        for number, (source, rows) in enumerate(zip(config.sources, opened, strict=True))
    ]
    train, held_out = catalogue.split(config.held_out, len(opened))
    counts = catalogue.counts
    parts: list[Examples] = []
    kept_out: list[SftExample] = []
    for number, (rows, format) in enumerate(zip(opened, formats, strict=True)):
        # While streaming nobody knows the lengths of the rest: numbers of these few would pass for those of all.
        kept_out += encoder.examples(rows, held_out[number], format, Counter() if config.streaming else counts)
        if config.streaming:
            parts.append(_Read(rows, train[number], format, encoder))
        else:
            parts.append(encoder.examples(rows, train[number], format, counts))
    _refuse_empty(config, parts, counts)
    return SftData(
        parts if config.sources[0].weight else [Joined(parts)],
        [source.weight for source in config.sources if source.weight] or [1.0],
        held_out=kept_out,
        seed=seed,
        told=_told(config, formats, counts),
        fingerprint=catalogue.fingerprint.hexdigest(),
    )


@dataclass(frozen=True, slots=True)
class Encoder:
    """From a row to what it teaches, and to tokens."""

    config: SftDataConfig
    tokenizer: PreTrainedTokenizerBase
    eos_ids: frozenset[int] | None = None

    def lesson(self, row: Row, format: str) -> Lesson:
        """As `lesson_of`, with the system prompt where the conversation has none."""
        lesson = lesson_of(row, format)
        system = self.config.system_prompt
        if system is None or not lesson.messages or lesson.messages[0]["role"] == "system":
            return lesson
        return Lesson(({"role": "system", "content": system}, *lesson.messages), dropped=lesson.dropped)

    def example(self, row: Row, format: str) -> tuple[SftExample | None, bool]:
        """The example, if anything that is learnt is left of it, and whether it was over `max_tokens`.

        Raises:
            ValueError: `file:line: reason`: the chat template refuses the row, or it is too long (on_long: error).
        """
        lesson, longest = self.lesson(row, format), self.config.max_tokens
        try:
            if lesson.text:
                ids, mask = encode_text(self.tokenizer, lesson.text)
            else:
                ids, mask = encode_conversation(
                    self.tokenizer,
                    lesson.messages,
                    eos_ids=self.eos_ids,
                    train_on=self.config.train_on,
                    enough=longest,
                )
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from error
        too_long = len(ids) > longest
        if too_long and self.config.on_long == "error":
            raise ValueError(
                f"{row.where}: got over {longest} tokens, expected at most data.max_tokens; raise it, or set "
                "data.on_long to cut or skip"
            )
        # A cut answer has no end token: none is invented.
        if not any(mask[:longest]) or (too_long and self.config.on_long == "skip"):
            return None, too_long
        example = SftExample(id=lesson_id(lesson), input_ids=tuple(ids[:longest]), response_mask=tuple(mask[:longest]))
        return example, too_long

    def examples(self, rows: Rows, chosen: np.ndarray, format: str, counts: Counter[str]) -> list[SftExample]:
        """Those of the chosen rows, and into `counts` what became of the long ones and how many tokens there are."""
        examples = []
        for index in chosen:
            example, too_long = self.example(rows[int(index)], format)
            if example is None:
                counts["too_long"] += 1
                continue
            counts["cut"] += too_long
            counts["tokens"] += len(example.input_ids)
            counts["trained_tokens"] += example.num_trained
            examples.append(example)
        return examples


@dataclass(slots=True)
class Catalogue:
    """Of every row that teaches something its id, its group and its place: 26 bytes a row."""

    counts: Counter[str] = field(default_factory=Counter)
    fingerprint: hashlib._Hash = field(default_factory=hashlib.sha256)
    _ids: array[int] = field(default_factory=lambda: array("Q"))
    _groups: array[int] = field(default_factory=lambda: array("Q"))
    _sources: array[int] = field(default_factory=lambda: array("H"))
    _places: array[int] = field(default_factory=lambda: array("Q"))

    def add(self, number: int, source: SftSourceConfig, rows: Rows, encoder: Encoder) -> str:
        """Enter the rows of source `number`; returns their format.

        Raises:
            ValueError: no row, one of another format, one that cannot be learnt from.
        """
        format: str = "" if source.format == "auto" else source.format
        place = -1
        for place, row in enumerate(rows):
            format = format or detect_format(row)
            lesson = encoder.lesson(row, format)
            group = _group(row, lesson)
            self.fingerprint.update(repr((number, lesson.messages, lesson.text, group)).encode() + b"\n")
            self.counts["rows"] += 1
            self.counts.update(lesson.dropped)
            if not lesson.messages and not lesson.text:
                self.counts["unanswered"] += 1
                continue
            self._ids.append(int(lesson_id(lesson), 16))
            self._groups.append(int(digest(group), 16))
            self._sources.append(number)
            self._places.append(place)
        if place < 0:
            raise ValueError(f"data.sources.{number}: got no rows, expected at least one; correct the source")
        return format

    def split(self, wanted: int, num_sources: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Of each source the rows to train on and those held out, after duplicates went."""
        _, first = np.unique(np.asarray(self._ids), return_index=True)
        first.sort()
        self.counts["duplicates"] = len(self._ids) - len(first)
        out = held_out_groups(np.asarray(self._groups)[first], wanted)
        sources = np.asarray(self._sources)[first]
        places = np.asarray(self._places)[first]
        train = [places[(sources == number) & ~out] for number in range(num_sources)]
        return train, [places[(sources == number) & out] for number in range(num_sources)]


def lesson_id(lesson: Lesson) -> str:
    """16 hex digits that depend on roles and texts alone."""
    return digest(lesson.text) if lesson.text else prompt_id(lesson.messages)


def _group(row: Row, lesson: Lesson) -> str:
    if own := own_group(row.values):
        return own
    return lesson.text or next((m["content"] for m in lesson.messages if m["role"] == "user"), "")


class _Read:
    """Examples of the chosen rows, tokenised when asked for."""

    def __init__(self, rows: Rows, chosen: np.ndarray, format: str, encoder: Encoder) -> None:
        self._rows, self._chosen, self._format, self._encoder = rows, chosen, format, encoder

    def __len__(self) -> int:
        return len(self._chosen)

    def __iter__(self) -> Iterator[SftExample]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int, /) -> SftExample:
        for offset in range(min(len(self), MOST_PASSED_OVER)):
            row = self._rows[int(self._chosen[(index + offset) % len(self)])]
            example, _ = self._encoder.example(row, self._format)
            if example is not None:
                return example
        raise ValueError(
            f"{row.where}: got {offset + 1} rows in a row of which nothing that is learnt fits into data.max_tokens="
            f"{self._encoder.config.max_tokens}, expected examples; raise it"
        )


def _refuse_empty(config: SftDataConfig, parts: Sequence[Examples], counts: Mapping[str, int]) -> None:
    """Without weights all sources are one; with weights each must have something to give."""
    together = [sum(map(len, parts))] if config.sources[0].weight is None else [len(part) for part in parts]
    if 0 in together:
        what = "data" if len(together) == 1 else f"data.sources.{together.index(0)}"
        raise ValueError(
            f"{what}: got no example to train on out of {counts['rows']} rows in all (held out: data.held_out="
            f"{config.held_out}, duplicates: {counts['duplicates']}, unanswered: {counts['unanswered']}, too long: "
            f"{counts['too_long']}), expected some; lower data.held_out, raise data.max_tokens or add rows"
        )


def _told(config: SftDataConfig, formats: Sequence[str], counts: Mapping[str, int]) -> str:
    told = [f"{name.replace('_', ' ')} {count:,}" for name, count in counts.items() if count]
    return ", ".join([*told, "formats " + " ".join(formats), *(["streaming"] if config.streaming else [])])

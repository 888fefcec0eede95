"""What a model learns from a file: its rows as tokens, what is trained set apart from what is only read."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from alignment.config import SftDataConfig
from alignment.data.formats import detect_format
from alignment.data.sft import Encoder
from alignment.data.sources import read_rows
from alignment.types import SftExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GREEN, DIM, BOLD, PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[1m", "\x1b[0m"
OPEN, CLOSE = "⟦", "⟧"
MARKS = f"{OPEN}{CLOSE}‹›"
_KEPT = "\n"


def shown_rows(
    config: SftDataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    eos_ids: frozenset[int] | None = None,
    color: bool,
) -> Iterator[str]:
    """The rows of the first source as text for a terminal, each with its numbers above it.

    Trained tokens are green, the others dim, control tokens bold by their names. Without `color` trained text stands
    in ⟦ ⟧ and control tokens in ‹ ›. What in the data could steer a terminal, or pass for a mark, is escaped.

    Raises:
        ValueError: as `load_sft_data`.
    """
    encoder, format = Encoder(config, tokenizer, eos_ids), str(config.sources[0].format)
    for row in read_rows(config.sources[0]):
        format = detect_format(row) if format == "auto" else format
        lesson = encoder.lesson(row, format)
        where = escaped(row.where).replace("\n", "\\n")
        head = f"{where}: {format}"
        if not lesson.messages and not lesson.text:
            yield f"{head}: nobody answers; the row is dropped\n"
            continue
        example, too_long = encoder.example(row, format)
        if example is None:
            yield f"{head}: nothing that is learnt fits into {config.max_tokens} tokens; the row is dropped\n"
            continue
        head += f", {len(example.input_ids)} tokens, {example.num_trained} trained"
        head += "".join(f", {what.replace('_', ' ')} dropped" for what in lesson.dropped)
        head += f", cut to {config.max_tokens}" if too_long else ""
        # Indented, so that no text of the data can pass for the head of a row.
        text = painted(example, tokenizer, color=color).replace("\n", "\n  ")
        yield f"{head}\n  {text}\n"


def painted(example: SftExample, tokenizer: PreTrainedTokenizerBase, *, color: bool) -> str:
    """One example as text; see `shown_rows`."""
    control = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    text = []
    for trained, tokens in groupby(
        zip(example.input_ids, example.response_mask, strict=True), key=lambda pair: pair[1]
    ):
        ids = [token for token, _ in tokens]
        runs = [(named, list(run)) for named, run in groupby(ids, key=control.__contains__)]
        if color:
            paint = GREEN if trained else DIM
            text += [f"{paint}{BOLD if named else ''}{_words(tokenizer, run)}{PLAIN}" for named, run in runs]
        else:
            inner = "".join(f"‹{_words(tokenizer, run)}›" if named else _words(tokenizer, run) for named, run in runs)
            text.append(f"{OPEN}{inner}{CLOSE}" if trained else inner)
    return "".join(text)


def escaped(text: str) -> str:
    """The text with what is not to be printed as Python writes it: control and format characters, and our marks."""
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") and character not in _KEPT
    if hidden or character in MARKS:
        return character.encode("unicode_escape", "surrogatepass").decode("ascii")
    return character


def _words(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return escaped(str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)))

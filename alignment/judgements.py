"""What a reward model learns from: answers that people compared, ranked, rated, labelled or followed step by step.

Every record shows its model some `sequences` of ids and reads a score at some positions of each (`reads`): at the
last token, or where a step ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from alignment.types import PreferencePair


class Judgement(Protocol):
    """What all records have, `PreferencePair` included."""

    @property
    def id(self) -> str: ...
    @property
    def prompt_ids(self) -> tuple[int, ...]: ...
    @property
    def source(self) -> str:
        """What the report tells accuracies of apart."""
        ...

    @property
    def sequences(self) -> tuple[tuple[int, ...], ...]:
        """Ids of prompt and answer, one for each answer."""
        ...

    @property
    def reads(self) -> tuple[tuple[int, ...], ...]:
        """Of each sequence the positions at which a score is read, rising."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """Several answers to one prompt, put in order."""

    id: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[tuple[int, ...], ...]
    """Two or more, the best first."""
    ranks: tuple[int, ...]
    """1 for the best; answers that tie share a rank. Never falling, not all the same."""
    source: str = ""

    @property
    def sequences(self) -> tuple[tuple[int, ...], ...]:
        return tuple(self.prompt_ids + ids for ids in self.answer_ids)

    @property
    def reads(self) -> tuple[tuple[int, ...], ...]:
        return last_tokens(self.sequences)


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedAnswer:
    """One answer and what people say of it by itself."""

    id: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    target: float
    """0 .. 1."""
    source: str = ""

    @property
    def sequences(self) -> tuple[tuple[int, ...], ...]:
        return (self.prompt_ids + self.answer_ids,)

    @property
    def reads(self) -> tuple[tuple[int, ...], ...]:
        return last_tokens(self.sequences)


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledAnswer(JudgedAnswer):
    """A yes (target 1) or a no (0)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RatedAnswer(JudgedAnswer):
    """The mean of the raters."""

    agreement: float = 1.0
    """1 minus the standard deviation of the raters: 1 where they agree, or where there is one; 0.5 where they split
    between both ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SteppedAnswer:
    """An answer in steps, each with a judgement of its own."""

    id: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    step_ends: tuple[int, ...]
    """Positions in `answer_ids`, rising: the token in which a step's text ends. The last step of an answer that was
    not cut is read at the answer's last token, where a finished answer is scored."""
    targets: tuple[float, ...]
    """0 .. 1, one per step."""
    source: str = ""

    @property
    def sequences(self) -> tuple[tuple[int, ...], ...]:
        return (self.prompt_ids + self.answer_ids,)

    @property
    def reads(self) -> tuple[tuple[int, ...], ...]:
        return (tuple(len(self.prompt_ids) + end for end in self.step_ends),)


KINDS: dict[str, type[Judgement]] = {
    "pairs": PreferencePair,
    "rankings": Ranking,
    "ratings": RatedAnswer,
    "labels": LabelledAnswer,
    "steps": SteppedAnswer,
}
"""By the name that `data.kind` has in the config."""


def kind_of(record: Judgement) -> str:
    return next(name for name, record_type in KINDS.items() if type(record) is record_type)


def last_tokens(sequences: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple((len(sequence) - 1,) for sequence in sequences)

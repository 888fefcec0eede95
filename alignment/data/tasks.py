"""Judgements of several tasks: read, held out task by task, mixed by weight and dealt out by step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

from alignment.config.preference import (
    JudgedDataConfig,
    LabelledTaskConfig,
    LabelsDataConfig,
    PairsDataConfig,
    TaskConfig,
)
from alignment.data.conversions import labels_of_pairs
from alignment.data.dialects import canonical
from alignment.data.judgements import COUNTS, fits, read_label, source_name
from alignment.data.mixing import Mixture
from alignment.data.preferences import PAIR_COUNTS, read_pair
from alignment.data.reading import Encoder, Reading, collect
from alignment.data.sources import Row, read_rows
from alignment.data.split import Split
from alignment.judgements import LabelledAnswer
from alignment.types import PreferencePair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

R = TypeVar("R", bound=PreferencePair | LabelledAnswer)
TaskT = TypeVar("TaskT", bound=TaskConfig)
Ids = tuple[int, ...]
Wholes = dict[Ids, set[Ids]]
"""By the ids of a prompt that was cut, those of the prompts that it was cut from."""


class Tasks(Generic[R]):
    """The records of a run; `source` of each is its task's name. `batch` is a pure function of its arguments."""

    def __init__(self, splits: dict[str, Split[R]], weights: Sequence[float] | None, *, seed: int) -> None:
        """
        Args:
            splits: by the task's name.
            weights: of each task; None joins them to one list.
        """
        self.splits = splits
        self.train = [record for split in splits.values() for record in split.train]
        self.held_out = [record for split in splits.values() for record in split.held_out]
        self._parts = [self.train] if weights is None else [split.train for split in splits.values()]
        self._weights = [1.0] if weights is None else list(weights)
        self._mixture = Mixture([len(part) for part in self._parts], self._weights, seed=seed)

    @property
    def names(self) -> list[str]:
        return list(self.splits)

    def batch(self, step: int, batch_size: int) -> list[R]:
        """The records of one step, from 0."""
        return [self._parts[part][index] for part, index in self._mixture.batch(step, batch_size)]

    def expected_share(self, of: Callable[[R], bool]) -> float:
        """Share of the rows of a long run for which `of` holds."""
        shares = [sum(map(of, part)) / len(part) for part in self._parts]
        return sum(w * share for w, share in zip(self._weights, shares, strict=True)) / sum(self._weights)

    def summary(self) -> str:
        """One line per task, without any text of the data."""
        return "; ".join(f"{name}: {split.summary()}" for name, split in self.splits.items())


def load_pair_tasks(
    config: PairsDataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    eos_ids: frozenset[int] | None = None,
    seed: int,
    kept_out: Collection[Ids] = (),
) -> Tasks[PreferencePair]:
    """Read, render, cut, drop duplicates and hold out whole prompts of every task.

    A prompt that is held out of one task is trained on in none, however data.cut_prompts cuts it; such rows are
    counted as held_out_too.

    Args:
        kept_out: ids of further prompts, whole ones, that are not to be trained on.

    Raises:
        ValueError: `file:line: reason` for a row that cannot be learnt from; a task with none to train on.
    """
    encoder, wholes = _encoder(config, tokenizer, eos_ids), Wholes()

    def read(task: TaskConfig, name: str) -> Split[PreferencePair]:
        return _split(task, config, PAIR_COUNTS, "pairs", lambda row: read_pair(row, encoder, source=name), wholes)

    return _tasks(config.sources, read, kept_out, wholes, seed)


def load_label_tasks(
    config: LabelsDataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    eos_ids: frozenset[int] | None = None,
    seed: int,
    kept_out: Collection[Ids] = (),
) -> Tasks[LabelledAnswer]:
    """As `load_pair_tasks`, of labels, and of pairs whose answers become labels."""
    encoder, wholes = _encoder(config, tokenizer, eos_ids), Wholes()

    def read(task: LabelledTaskConfig, name: str) -> Split[LabelledAnswer]:
        kind = task.kind
        if kind == "auto":
            kind = "pairs" if fits(_rows(task)[0], "pairs") else "labels"
        if kind == "labels":
            told = COUNTS["labels"]
            return _split(task, config, told, "labels", lambda row: read_label(row, encoder, source=name), wholes)
        pairs = _split(task, config, PAIR_COUNTS, "pairs", lambda row: read_pair(row, encoder, source=name), wholes)
        return Split(labels_of_pairs(pairs.train), labels_of_pairs(pairs.held_out), pairs.counts)

    return _tasks(config.sources, read, kept_out, wholes, seed)


def _encoder(config: JudgedDataConfig, tokenizer: PreTrainedTokenizerBase, eos_ids: frozenset[int] | None) -> Encoder:
    return Encoder(
        tokenizer=tokenizer,
        eos_ids=eos_ids,
        max_tokens=config.max_tokens,
        system_prompt=config.system_prompt,
        cut_prompts=config.cut_prompts,
    )


def _split(
    task: TaskConfig,
    config: JudgedDataConfig,
    told: Sequence[str],
    what: str,
    read: Callable[[Row], Reading[R]],
    wholes: Wholes,
) -> Split[R]:
    """A task's records, part of them held out, or those of its other source: their groups are then trained on no more.

    Prompts that are cut are noted in `wholes`.
    """

    def collected(rows: Iterable[Row], wanted: int) -> tuple[Split[R], dict[str, str]]:
        groups: dict[str, str] = {}

        def noted(row: Row) -> Reading[R]:
            reading = read(row)
            groups.setdefault(reading.record.id, reading.group)
            if reading.whole_prompt != reading.record.prompt_ids:
                wholes.setdefault(reading.record.prompt_ids, set()).add(reading.whole_prompt)
            return reading

        skip_long = config.on_long == "skip"
        return collect(rows, noted, wanted=wanted, told=told, what=what, skip_long=skip_long), groups

    if task.held_out is None:
        return collected(_rows(task), config.held_out)[0]
    own, groups = collected(_rows(task), 0)
    others, other_groups = collected(map(canonical, read_rows(task.held_out)), 0)
    out = {other_groups[record.id] for record in others.train}
    return _without(own, others.train, lambda record: groups[record.id] in out)


def _without(split: Split[R], held_out: list[R], is_out: Callable[[R], bool]) -> Split[R]:
    """The split with fewer rows to train on, counted as held_out_too."""
    train = [record for record in split.train if not is_out(record)]
    left_out = split.counts.get("held_out_too", 0) + len(split.train) - len(train)
    return Split(train, held_out, {**split.counts, **({"held_out_too": left_out} if left_out else {})})


def _rows(task: TaskConfig) -> list[Row]:
    return [canonical(row) for row in read_rows(task)]


def _tasks(
    configs: Sequence[TaskT],
    read: Callable[[TaskT, str], Split[R]],
    kept_out: Collection[Ids],
    wholes: Wholes,
    seed: int,
) -> Tasks[R]:
    names = [task.name or source_name(task) for task in configs]
    if len(set(names)) < len(names):
        raise ValueError(f"data.sources: got tasks named {names}, expected different names; set name of each")
    splits = {name: read(task, name) for name, task in zip(names, configs, strict=True)}

    def asked(record: R) -> set[Ids]:
        """The prompt as it is learnt from, and what it was cut from."""
        return {record.prompt_ids, *wholes.get(record.prompt_ids, ())}

    out = set(kept_out).union(*(asked(record) for split in splits.values() for record in split.held_out))
    for name, split in splits.items():
        kept = _without(split, split.held_out, lambda record: not out.isdisjoint(asked(record)))
        if not kept.train:
            raise ValueError(
                f"data.sources: got {kept.counts['held_out_too']} records of {name!r} behind prompts that are all "
                "held out, expected some to train on; add rows, or hold out others"
            )
        splits[name] = kept
    weights = [task.weight for task in configs if task.weight is not None]
    return Tasks(splits, weights or None, seed=seed)

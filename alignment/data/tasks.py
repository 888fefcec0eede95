"""Judgements of several tasks: read, held out task by task, mixed by weight and dealt out by step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

from alignment.config.judged_data import (
    JudgedDataConfig,
    LabelledTaskConfig,
    LabelsDataConfig,
    PairedTaskConfig,
    PairsDataConfig,
    TaskConfig,
    refuse_unread_ratings,
)
from alignment.data.conversions import labels_of_pairs, labels_of_ratings, pairs_of_rankings, pairs_of_ratings
from alignment.data.dialects import canonical
from alignment.data.judgements import COUNTS, fits, read_label, read_ranking, read_rating, source_name
from alignment.data.mixing import Mixture
from alignment.data.preferences import read_pair
from alignment.data.reading import Encoder, J, Reading, collect
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
    """Read, render, cut, drop duplicates and hold out whole prompts of every task; then rankings and ratings become
    pairs.

    A prompt that is held out of one task is trained on in none, however data.cut_prompts cuts it; such rows are
    counted as held_out_too.

    Args:
        kept_out: ids of further prompts, whole ones, that are not to be trained on.

    Raises:
        ValueError: `file:line: reason` for a row that cannot be learnt from; a task with none to train on.
    """
    encoder, wholes = _encoder(config, tokenizer, eos_ids), Wholes()

    def read(task: PairedTaskConfig, name: str) -> Split[PreferencePair]:
        kind = _kind(task, task.kind, ("pairs", "rankings", "ratings"), "pairs")
        told_apart = {"min_gap": task.min_gap, "threshold": task.threshold}
        refuse_unread_ratings(kind, told_apart, f"data.sources: {name}")
        if kind == "rankings":
            rankings = _split(task, config, kind, lambda row: read_ranking(row, encoder, source=name), wholes)
            return _converted(rankings, pairs_of_rankings, name)
        if kind == "ratings":
            if config.cut_prompts:
                raise ValueError(
                    f"data.cut_prompts: got true with the ratings of {name!r}, expected false: answers are paired "
                    "behind the same prompt; set it to false, or raise data.max_tokens"
                )
            ratings = _split(task, config, kind, lambda row: read_rating(row, encoder, source=name), wholes)
            return _converted(ratings, partial(pairs_of_ratings, gap=task.min_gap, threshold=task.threshold), name)
        return _split(task, config, kind, lambda row: read_pair(row, encoder, source=name), wholes)

    return _tasks(config.sources, read, kept_out, wholes, seed)


def load_label_tasks(
    config: LabelsDataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    eos_ids: frozenset[int] | None = None,
    seed: int,
    kept_out: Collection[Ids] = (),
) -> Tasks[LabelledAnswer]:
    """As `load_pair_tasks`, of labels, and of pairs and ratings whose answers become labels."""
    encoder, wholes = _encoder(config, tokenizer, eos_ids), Wholes()

    def read(task: LabelledTaskConfig, name: str) -> Split[LabelledAnswer]:
        kind = _kind(task, task.kind, ("pairs", "labels", "ratings"), "labels")
        refuse_unread_ratings(kind, {"threshold": task.threshold}, f"data.sources: {name}")
        if kind == "pairs":
            pairs = _split(task, config, kind, lambda row: read_pair(row, encoder, source=name), wholes)
            return _converted(pairs, labels_of_pairs, name)
        if kind == "ratings":
            assert task.threshold is not None
            ratings = _split(task, config, kind, lambda row: read_rating(row, encoder, source=name), wholes)
            return _converted(ratings, partial(labels_of_ratings, threshold=task.threshold), name)
        return _split(task, config, kind, lambda row: read_label(row, encoder, source=name), wholes)

    return _tasks(config.sources, read, kept_out, wholes, seed)


def _kind(task: TaskConfig, kind: str, known: Sequence[str], otherwise: str) -> str:
    """`auto` as the first kind whose columns the first row has; `otherwise` will refuse a row that has none's."""
    if kind != "auto":
        return kind
    first = _rows(task)[0]
    return next((one for one in known if fits(first, one)), otherwise)


def _converted(split: Split[J], convert: Callable[[list[J]], list[R]], name: str) -> Split[R]:
    """What a conversion makes of both parts."""
    found = Split(convert(split.train), convert(split.held_out), split.counts)
    if bool(split.held_out) > bool(found.held_out) or not found.train:
        part = "to train on" if not found.train else "to hold out"
        raise ValueError(
            f"data.sources: got rows of {name!r} that give nothing {part}, expected answers to one prompt that are "
            "told apart; lower min_gap, move threshold, or add rows"
        )
    return found


def _encoder(config: JudgedDataConfig, tokenizer: PreTrainedTokenizerBase, eos_ids: frozenset[int] | None) -> Encoder:
    return Encoder(
        tokenizer=tokenizer,
        eos_ids=eos_ids,
        max_tokens=config.max_tokens,
        system_prompt=config.system_prompt,
        cut_prompts=config.cut_prompts,
    )


def _split(
    task: TaskConfig, config: JudgedDataConfig, kind: str, read: Callable[[Row], Reading[J]], wholes: Wholes
) -> Split[J]:
    """A task's records, part of them held out, or those of its other source: their groups are then trained on no more.

    Prompts that are cut are noted in `wholes`.
    """

    def collected(rows: Iterable[Row], wanted: int) -> tuple[Split[J], dict[str, str]]:
        groups: dict[str, str] = {}

        def noted(row: Row) -> Reading[J]:
            reading = read(row)
            groups.setdefault(reading.record.id, reading.group)
            if reading.whole_prompt != reading.record.prompt_ids:
                wholes.setdefault(reading.record.prompt_ids, set()).add(reading.whole_prompt)
            return reading

        skip_long = config.on_long == "skip"
        return collect(rows, noted, wanted=wanted, told=COUNTS[kind], what=kind, skip_long=skip_long), groups

    if task.held_out is None:
        return collected(_rows(task), config.held_out)[0]
    own, groups = collected(_rows(task), 0)
    others, other_groups = collected(map(canonical, read_rows(task.held_out)), 0)
    out = {other_groups[record.id] for record in others.train}
    return _without(own, others.train, lambda record: groups[record.id] in out)


def _without(split: Split[J], held_out: list[J], is_out: Callable[[J], bool]) -> Split[J]:
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

"""Judgements of answers that a policy learns from: tasks, what their rows are, what is held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field, model_validator

from alignment.config.base import Config, NonNegative, Positive, PositiveFloat, Share
from alignment.config.data import SourceConfig


def refuse_unread_ratings(kind: str, given: Mapping[str, float | None], where: str = "sources") -> None:
    """
    Args:
        kind: of a task's rows; with `auto` they have to be seen first.
        given: what could tell ratings apart, by name.

    Raises:
        ValueError: two of them, one for rows that are no ratings, or none for ratings.
    """
    named = {name: value for name, value in given.items() if value is not None}
    expected = ""
    if len(named) > 1 or (kind == "ratings" and not named):
        expected = f"one of {', '.join(given)}"
    elif named and kind not in ("auto", "ratings"):
        expected = "none: they are of ratings"
    if expected:
        raise ValueError(f"{where}: got {named or 'nothing'} with {kind}, expected {expected}; set or remove it")


class TaskConfig(SourceConfig):
    """One set of judgements."""

    name: str | None = None
    """What metrics and tables call it; None takes the asset, the data set or the file."""
    weight: PositiveFloat | None = None
    """Share of the rows of a run that come from here, relative to the other tasks' weights; the task begins again when
    it is through. Give every task one, or none: then all are one list, each row once an epoch."""
    held_out: SourceConfig | None = None
    """Rows to validate on, in place of data.held_out of this task's own; a prompt among them is not trained on."""


class PairedTaskConfig(TaskConfig):
    """One set of pairs, or of rankings or ratings that become pairs."""

    kind: Literal["auto", "pairs", "rankings", "ratings"] = "auto"
    """What its rows are; `auto` goes by the columns of the first one. A ranking becomes the pairs of its answers that
    do not tie, ratings the pairs of answers to one prompt that min_gap or threshold tells apart."""
    min_gap: Share | None = None
    """By how much the better answer of a pair of ratings is rated higher, at least."""
    threshold: Share | None = None
    """A rating that the better answer reaches and the other does not, in place of min_gap."""

    @model_validator(mode="after")
    def _ratings_alone_are_told_apart(self) -> PairedTaskConfig:
        refuse_unread_ratings(self.kind, {"min_gap": self.min_gap, "threshold": self.threshold})
        return self


class LabelledTaskConfig(TaskConfig):
    """One set of labels, or of pairs or ratings that become labels."""

    kind: Literal["auto", "pairs", "labels", "ratings"] = "auto"
    """What its rows are; `auto` goes by the columns of the first one. The chosen answer of a pair is a desirable one,
    the rejected answer an undesirable one; of ratings those that reach the threshold are desirable."""
    threshold: Share | None = None
    """The least rating of a desirable answer."""

    @model_validator(mode="after")
    def _ratings_alone_have_a_threshold(self) -> LabelledTaskConfig:
        refuse_unread_ratings(self.kind, {"threshold": self.threshold})
        return self


class JudgedDataConfig(Config):
    """Judgements of answers to learn from."""

    system_prompt: str | None = None
    """Put before every conversation that has none; None leaves the template's own default."""
    max_tokens: Positive = 512
    """Longer sequences of prompt and answer are cut from the end of the answer."""
    cut_prompts: bool = False
    """Cut a prompt from its beginning, down to 16 tokens, before an answer loses anything; cut prompts are counted."""
    on_long: Literal["error", "skip"] = "error"
    """What becomes of a row whose prompt leaves no room for an answer, or whose answers differ only beyond max_tokens:
    it is refused, or left out and counted."""
    held_out: NonNegative = 32
    """Rows of every task kept for validation and for the table; whole groups (column `group`, else the prompt)."""


class PairsDataConfig(JudgedDataConfig):
    """Pairs of answers; docs/preferences.md has the columns."""

    sources: tuple[PairedTaskConfig, ...] = Field(default=(PairedTaskConfig(asset="treatment-plans"),), min_length=1)
    """One task or more."""

    @model_validator(mode="after")
    def _tasks_fit_together(self) -> PairsDataConfig:
        refuse_odd_tasks(self.sources)
        return self


class LabelsDataConfig(JudgedDataConfig):
    """Labelled answers; docs/preferences.md has the columns."""

    sources: tuple[LabelledTaskConfig, ...] = Field(
        default=(LabelledTaskConfig(asset="treatment-plans"),), min_length=1
    )
    """One task or more."""

    @model_validator(mode="after")
    def _tasks_fit_together(self) -> LabelsDataConfig:
        refuse_odd_tasks(self.sources)
        return self


def refuse_odd_tasks(tasks: Sequence[TaskConfig]) -> None:
    """Weights of some tasks only, and two tasks of one name."""
    given = [task.weight for task in tasks]
    if None in given and any(weight is not None for weight in given):
        raise ValueError(f"sources: got weights {given}, expected one for every task or for none; add or drop some")
    names = [task.name for task in tasks if task.name is not None]
    if len(set(names)) < len(names):
        raise ValueError(f"sources: got names {names}, expected a different one for each task; rename one")

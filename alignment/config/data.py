"""Where rows come from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from alignment.config.base import Config, NonNegative, Positive, PositiveFloat

SftFormat = Literal["auto", "alpaca", "sharegpt", "messages", "prompt_completion", "text"]
OnLong = Literal["cut", "skip", "error"]
TrainOn = Literal["all_turns", "last_turn"]


class SourceConfig(Config):
    """Where rows come from: exactly one of `path`, `hub`, `asset`."""

    path: str | None = None
    """Local file or glob: .jsonl .json .csv .parquet, each also .gz."""
    hub: str | None = None
    """Data set name for `datasets.load_dataset`."""
    hub_split: str = "train"
    """Split of the hub data set."""
    asset: str | None = None
    """Name of a packaged asset (see alignment/data/assets.py)."""
    limit: Positive | None = None
    """Read at most this many rows."""

    @model_validator(mode="after")
    def _one_source(self) -> SourceConfig:
        given = [name for name in ("path", "hub", "asset") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"got {given or 'no source'}, expected exactly one of path, hub, asset; set one of them")
        return self


class PromptDataConfig(Config):
    """Prompts for online training and for the held-out table."""

    source: SourceConfig = SourceConfig(asset="healthsearchqa")
    """Rows of prompts."""
    prompt_key: str = "question"
    """Column with the user's text, or with a `messages` list."""
    system_prompt: str | None = None
    """Put before every conversation; None leaves the template's own default."""
    max_prompt_tokens: Positive = 128
    """A longer prompt is refused (or skipped, see on_long_prompt)."""
    on_long_prompt: Literal["error", "skip"] = "error"
    """`skip` drops prompts over the limit and counts them aloud."""
    held_out: NonNegative = 48
    """Prompts kept out of training and answered before and after; chosen by a hash of the prompt id."""


class PreferenceDataConfig(Config):
    """Pairs for a reward model."""

    source: SourceConfig = SourceConfig(asset="treatment-plans")
    """Rows with `prompt`, `chosen`, `rejected`."""
    system_prompt: str | None = None
    """As in the run that will use the reward model."""
    max_tokens: Positive = 256
    """Longer sequences are cut from the end of the answer."""
    cut_prompts: bool = False
    """Cut a prompt from its beginning, down to 16 tokens, before an answer loses anything; cut prompts are counted."""
    held_out: NonNegative = 32
    """Pairs kept for the accuracy report; split by prompt."""


class SftSourceConfig(SourceConfig):
    """One source of texts to learn from."""

    format: SftFormat = "auto"
    """What its rows are; `auto` goes by the columns of the first row. See docs/data.md."""
    weight: PositiveFloat | None = None
    """Share of the examples that come from here, relative to the other sources' weights; the source begins again when
    it is through. Give every source one, or none: then all are one list, each row once an epoch."""


class SftDataConfig(Config):
    """Texts to learn from: conversations, whose answers are learnt, or plain text."""

    sources: tuple[SftSourceConfig, ...] = Field((SftSourceConfig(asset="treatment-plan-answers"),), min_length=1)
    """One or more."""
    system_prompt: str | None = None
    """Put before every conversation that has none; None leaves the template's own default."""
    max_tokens: Positive = 512
    """The longest example, see on_long."""
    on_long: OnLong = "cut"
    """`cut` takes tokens from the end: a cut answer has no end token, and an example with nothing left to learn is
    dropped; `skip` drops the example; both count aloud. `error` refuses it."""
    train_on: TrainOn = "all_turns"
    """Which of the assistant's turns are learnt. Plain text always is."""
    held_out: NonNegative = 64
    """Examples kept for the evaluation; whole groups (column `group`, else the first user message), by a hash."""
    streaming: bool = False
    """Read rows when a step asks for them: for data larger than memory. .jsonl, .parquet and hub data sets alone."""

    @model_validator(mode="after")
    def _all_weights_or_none(self) -> SftDataConfig:
        given = [source.weight for source in self.sources]
        if None in given and any(weight is not None for weight in given):
            raise ValueError(
                f"sources: got weights {given}, expected one for every source or for none; add or drop some"
            )
        return self

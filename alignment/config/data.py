"""Where rows come from."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from alignment.config.base import Config, NonNegative, Positive


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
    held_out: NonNegative = 32
    """Pairs kept for the accuracy report; split by prompt."""

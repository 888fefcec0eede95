"""The run itself: seed, length, checkpoints, what is written and shown."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from alignment.config.base import Config, NonNegative, Positive


class RunConfig(Config):
    """One run."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    """Decides data order, sampling, and initialisation."""
    num_steps: Positive = 10
    """Steps of the loop."""
    checkpoint_every: Positive = 1
    """Steps between checkpoints."""
    keep_checkpoints: Positive = 2
    """Newest complete checkpoints kept."""
    show_text: bool = False
    """Allow prompts and answers on the console; they are in rollouts.jsonl (mode 0600) in any case."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Writers beside metrics.jsonl."""


class EvaluationConfig(Config):
    """The held-out table."""

    greedy: bool = False
    """Most likely tokens instead of samples; before and after draw the same random numbers either way."""
    num_shown: NonNegative = 4
    """Held-out prompts printed with both answers at the end, only with run.show_text."""

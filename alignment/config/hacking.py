"""When a run warns that its reward is being exploited."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from alignment.config.base import Config, Fraction


class HackingConfig(Config):
    """Signs that the policy exploits its reward. They are printed and logged; training goes on."""

    window: Annotated[int, Field(ge=3)] = 10
    """Steps of a stretch: each stretch is compared with every earlier one, so the first warning takes two."""
    false_alarm_rate: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Chance, at most, that a run whose gold stays as it is, is told that proxy and gold part."""
    length_factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 2.0
    """Answers this many times longer or shorter than in the first stretch are a sign."""
    duplicate_share: Fraction = 0.25
    """More answers than this share that equal one to another prompt are a sign, unless there were in the first
    stretch."""
    clipped_share: Fraction = 0.5
    """More scores than this share cut by a clip are a sign."""
    unscored_gold_share: Fraction = 0.1
    """More answers than this share that a gold function has no number for are told: it measures little then."""
    stop_on: tuple[Literal["parted", "length", "duplicates", "clipped", "gold_unscored"], ...] = ()
    """Signs that end the run when they begin."""

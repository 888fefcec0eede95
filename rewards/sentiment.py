"""How happy an answer sounds: a reward that is easily exploited, to see that being noticed."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

from rewards.base import only_where

LONGEST = 1_000
"""Characters of an answer that are read. Time grows with their square: a thousand emoji take 0.3 s on one core."""


def require_vader() -> None:
    """
    Raises:
        ValueError: the package is not installed.
    """
    if importlib.util.find_spec("vaderSentiment") is None:
        raise ValueError("got no package vaderSentiment, expected it installed; pip install 'raylign[sentiment]'")


@only_where(require_vader)
def vader(prompts: list[str], responses: list[str], **columns: Any) -> list[float | None]:
    """The compound sentiment of VADER (Hutto and Gilbert 2014) in [-1, 1], of the first 1,000 characters.

    Hackable by design: it counts happy words whatever is said with them. `recipes/configs/ppo_vader.yaml` trains on it
    to show the warning.
    """
    analyser = _analyser()
    return [float(analyser.polarity_scores(response[:LONGEST])["compound"]) for response in responses]


@functools.cache
def _analyser() -> Any:
    require_vader()
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()

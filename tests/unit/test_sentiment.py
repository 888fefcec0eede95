"""The reward that is made to be exploited."""

from __future__ import annotations

import sys

import pytest
from patience import no_explosion

from rewards.base import check_settings, load_function
from rewards.sentiment import LONGEST, vader


def test_without_the_package_the_run_is_refused_before_it_starts(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)  # as Python marks what is not to be found
    with pytest.raises(ValueError, match=r"got no package vaderSentiment, .* pip install 'raylign\[sentiment\]'"):
        check_settings("sentiment:vader", load_function("sentiment:vader"), {})


def test_happy_words_score_whatever_they_say():
    pytest.importorskip("vaderSentiment")
    check_settings("sentiment:vader", load_function("sentiment:vader"), {})
    answers = [
        "VADER is smart, handsome, and funny.",  # the package's own example
        "The pain is terrible and you may die.",
        "Joy love happy wonderful great joy.",
        "Take it with water.",
        "",
    ]
    scores = vader(["How?"] * 5, answers)
    assert scores[0] == 0.8316
    assert scores[1] < -0.5
    assert scores[2] > 0.95
    assert scores[3:] == [0.0, 0.0]


def test_what_comes_after_the_limit_is_not_read_and_costs_nothing():
    pytest.importorskip("vaderSentiment")
    assert vader(["q"] * 2, ["a" * LONGEST + " love", "a " * (LONGEST // 2) + "love"]) == [0.0, 0.0]
    with no_explosion(5.0):
        vader(["q"], ["\N{GRINNING FACE}" * 1_000_000])

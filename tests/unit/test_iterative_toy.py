"""What rounds are for: a policy that learns from pairs of its own answers comes to give better ones."""

from __future__ import annotations

import math
import os

import pytest
from tiny_rounds import RoundRun, write_letter_prompts

from alignment.loops.iterative import RankedRound, rank_round

PROMPTS, SAMPLES = 20, 24
SECTIONS = {
    "run": {"num_steps": 32, "checkpoint_every": 32, "trackers": []},
    "rollout": {"engine": "transformers", "max_new_tokens": 1},
    "ranking": {
        "num_samples_per_prompt": SAMPLES,
        "batch_size": PROMPTS,
        "pairs_per_prompt": 6,
        "on_cut": "keep",
    },
    "rounds": {"prompts_per_round": PROMPTS, "steps_per_round": 8, "replay_share": 0.5},
    "training": {"batch_size": 16, "adapter": {"r": 16}, "optimizer": {"lr": 1e-2}},
}


@pytest.fixture(autouse=True)
def _same_umask_afterwards():
    before = os.umask(0o022)
    yield
    os.umask(before)


def scores_of_rounds(tiny, folder, judge) -> list[float]:
    prompts = write_letter_prompts(folder / "prompts.jsonl")
    run = RoundRun(tiny, prompts, folder / judge.__name__, **SECTIONS)
    run.judge = lambda number, answered: judge(run.config, answered)
    with run.stack:
        assert run.train()
    return [row["round/score"] for row in run.metrics() if "round/score" in row]


def swapped(config, answered) -> RankedRound:
    """The worse answer as the one to learn from."""
    found = rank_round(config, answered)
    rows = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in found.rows]
    return RankedRound(rows=rows, figures=found.figures)


@pytest.mark.slow
def test_answers_of_later_rounds_score_better_and_with_swapped_pairs_they_do_not(tiny, tmp_path):
    """The share of answers that are a small letter, which starts near the 26 of some 260 tokens."""
    first, *later = scores_of_rounds(tiny, tmp_path, rank_round)
    spread = math.sqrt(2 * first * (1 - first) / (PROMPTS * SAMPLES))  # of a difference, answers being independent
    assert len(later) == 3
    assert min(later) > first, (first, later)
    assert later[-1] - first > 4 * spread, (first, later)
    same, *worse = scores_of_rounds(tiny, tmp_path, swapped)
    assert same == first
    assert max(worse) - first < spread, (first, worse)

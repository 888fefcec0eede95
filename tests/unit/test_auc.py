"""The area under the ROC curve: by hand, in closed form, and how sure a gain in it is."""

from __future__ import annotations

import math

import pytest
import torch

from alignment.auc import auc, auc_gain


@pytest.mark.parametrize(
    ("scores", "positive", "expected"),
    [
        ([3.0, 2.0, 1.0, 0.0], [1, 1, 0, 0], 1.0),
        ([0.0, 1.0, 2.0, 3.0], [1, 1, 0, 0], 0.0),
        ([1.0, 1.0, 1.0], [1, 0, 0], 0.5),
        # Won: 4 over 1, 3 and 2, 2 over 1; tied: 2 with 2; lost: 2 to 3.
        ([4.0, 2.0, 1.0, 3.0, 2.0], [1, 1, 0, 0, 0], 4.5 / 6),
    ],
)
def test_by_hand(scores, positive, expected):
    assert auc(scores, [bool(p) for p in positive]) == pytest.approx(expected)


def test_of_two_normals_it_is_the_probability_that_one_is_above_the_other():
    """Phi(d / sqrt 2) for unit variances whose means are d apart; a monotone map changes nothing."""
    generator = torch.Generator().manual_seed(0)
    good, bad = torch.randn(3000, generator=generator) + 1.0, torch.randn(3000, generator=generator)
    scores, positive = torch.cat([good, bad]), [True] * 3000 + [False] * 3000
    found = auc(scores.tolist(), positive)
    assert found == pytest.approx(0.5 * (1 + math.erf(0.5)), abs=0.01)
    assert auc(torch.exp(scores).tolist(), positive) == found


def test_the_interval_of_a_gain_has_the_width_of_theory():
    """From ties to normals: the standard error of an AUC by Hanley and McNeil (1982)."""
    generator = torch.Generator().manual_seed(1)
    n = 120
    scores = torch.cat([torch.randn(n, generator=generator) + 0.8, torch.randn(n, generator=generator)]).tolist()
    positive = [True] * n + [False] * n
    row = auc_gain([0.0] * 2 * n, scores, positive, num_resamples=4000)
    a = row["after"]
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    error = math.sqrt((a * (1 - a) + (n - 1) * (q1 + q2 - 2 * a * a)) / n**2)
    low, high = row["gain_ci95"]
    assert (row["before"], row["n"], row["higher_is_better"]) == (0.5, 2 * n, True)
    assert low < a - 0.5 < high
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.15)
    assert [bound + 0.5 for bound in row["gain_ci95"]] == pytest.approx(row["after_ci95"])


def test_pairing_items_takes_away_what_both_scores_share():
    """The same scores twice have no gain at all; unpaired, the interval would be as wide as both."""
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(40, generator=generator).tolist()
    positive = [i % 3 == 0 for i in range(40)]
    assert auc_gain(scores, scores, positive)["gain_ci95"] == [0.0, 0.0]


def test_each_class_keeps_its_number():
    """One positive item above all others stays there whatever is drawn."""
    assert auc_gain([0.0] * 4, [9.0, 1.0, 2.0, 3.0], [True, False, False, False])["gain_ci95"] == [0.5, 0.5]


@pytest.mark.parametrize("positive", [[True, True], [False, False], [True]])
def test_one_class_alone_is_refused(positive):
    with pytest.raises(ValueError, match="expected some of both"):
        auc([1.0, 2.0], positive)


def test_items_of_a_group_are_drawn_together():
    """Each prompt's answers copied four times tell no more than once; as items of their own they would seem to."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(30, generator=generator).tolist()
    positive = [i % 2 == 0 for i in range(30)]
    once = auc_gain([0.0] * 30, scores, positive)
    copied = [0.0] * 120, scores * 4, positive * 4
    together = auc_gain(*copied, groups=list(range(30)) * 4)
    apart = auc_gain(*copied)
    assert together["after"] == pytest.approx(once["after"])
    assert together["gain_ci95"] == pytest.approx(once["gain_ci95"])
    width = [row["gain_ci95"][1] - row["gain_ci95"][0] for row in (once, apart)]
    assert width[1] / width[0] == pytest.approx(0.5, abs=0.1)

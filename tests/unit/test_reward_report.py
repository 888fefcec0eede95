"""The report on a reward model: closed forms of every figure, and what is not said of private texts."""

from __future__ import annotations

import math

import pytest
from tiny_judgements import judgements_of

from alignment.calibration import best_threshold, calibration_table, expected_calibration_error, spearman
from alignment.judgements import LabelledAnswer, Ranking, RatedAnswer
from alignment.loops.reward_report import decisions, record_report, render, reward_report
from alignment.types import PreferencePair


def test_spearman():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 400]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # Ranks 0, 1.5, 1.5, 3 and 0, 1, 2, 3: 4.5 / sqrt(4.5 x 5).
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(22.5))
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    assert spearman([1], [1]) is None
    with pytest.raises(ValueError, match="got 2 and 1 items"):
        spearman([1, 2], [1])


def test_calibration_bins_and_their_error():
    bins = calibration_table([0.05, 0.05, 0.95, 1.0, 0.55], [0, 1, 1, 1, 0])
    assert [one.count for one in bins] == [2, 0, 0, 0, 0, 1, 0, 0, 0, 2]
    assert (bins[0].predicted, bins[0].observed, bins[1].predicted) == (pytest.approx(0.05), 0.5, None)
    # (2 x |0.05 - 0.5| + 1 x |0.55 - 0| + 2 x |0.975 - 1|) / 5
    assert expected_calibration_error(bins) == pytest.approx((0.9 + 0.55 + 0.05) / 5)
    upper = calibration_table([0.5, 0.54, 0.56, 1.0], [1, 1, 1, 1], low=0.5)
    assert [one.count for one in upper] == [2, 1, 0, 0, 0, 0, 0, 0, 0, 1]


def test_the_best_cut_through_one_number():
    cut = best_threshold([1, 2, 3, 4, 5], [False, False, True, True, False])
    assert (cut.bound, cut.above) == (3, True)
    assert [cut(x) for x in (2.9, 3, 9)] == [False, True, True]
    below = best_threshold([1, 2, 3, 4], [True, True, False, False])
    assert (below.bound, below.above) == (3, False)


def labelled(target, length, name="x", source="s"):
    return LabelledAnswer(id=name, prompt_ids=(1,), answer_ids=tuple(range(length)), target=target, source=source)


def test_what_is_decided_of_each_kind():
    (pair,) = decisions(PreferencePair(id="p", prompt_ids=(1,), chosen_ids=(2, 3), rejected_ids=(4,)), [2.0, 1.0])
    assert (pair.margin, pair.correct, pair.lengths, pair.observed) == (1.0, True, (2, 1), 1.0)
    assert pair.predicted == pytest.approx(0.7310586)
    ranking = Ranking(id="r", prompt_ids=(1,), answer_ids=((2,), (3,), (4, 5)), ranks=(1, 1, 2))
    made = list(decisions(ranking, [0.0, 3.0, 1.0]))
    assert [(d.id, d.margin, d.correct) for d in made] == [("r/1>3", -1.0, False), ("r/2>3", 2.0, True)]
    (label,) = decisions(labelled(0.0, 3), [-2.0])
    assert (label.margin, label.correct) == (2.0, True)
    assert label.predicted == pytest.approx(0.1192029)
    (rating,) = decisions(RatedAnswer(id="a", prompt_ids=(1,), answer_ids=(2,), target=0.25), [0.0])
    assert (rating.margin, rating.correct) == (-0.25, False)
    (unsure,) = decisions(PreferencePair(id="p", prompt_ids=(1,), chosen_ids=(2,), rejected_ids=(4,)), [1.0, 1.0])
    assert not unsure.correct, "a tie counts as wrong"


def test_intervals_are_wilsons_or_resample_records():
    pairs = judgements_of("pairs", 20)
    scores = [(1.0, 0.0)] * 15 + [(0.0, 1.0)] * 5
    report = record_report(pairs, scores)
    assert report["accuracy"] == 0.75
    assert report["accuracy_ci95"] == pytest.approx([0.5313, 0.8881], abs=1e-4)
    rankings = judgements_of("rankings", 12)
    rows = [tuple(range(len(r.ranks), 0, -1)) if i % 2 else tuple(range(len(r.ranks))) for i, r in enumerate(rankings)]
    report = record_report(rankings, rows)
    assert report["accuracy"] == 0.5
    assert report["n"] == 12
    low, high = report["accuracy_ci95"]
    assert 0.15 < low < 0.35 < 0.65 < high < 0.85


def test_answers_to_one_prompt_are_resampled_together():
    def pair(k, prompt):
        return PreferencePair(id=f"p{k}", prompt_ids=(prompt,), chosen_ids=(2, k), rejected_ids=(4, k))

    scores = [(1.0, 0.0)] * 20 + [(0.0, 1.0)] * 20
    apart = record_report([pair(k, k) for k in range(40)], scores)["accuracy_ci95"]
    together = record_report([pair(k, k // 10) for k in range(40)], scores)["accuracy_ci95"]
    # Four prompts, two of which are right throughout: chances of 1/16 that all drawn ones are, or none is.
    assert together == [0.0, 1.0]
    assert apart == pytest.approx([0.352, 0.648], abs=2e-3)


def report_of(train, held_out, scores):
    return reward_report(train, held_out, scores, step=3, seed=0, decode=lambda ids: f"secret {len(ids)}")


def test_a_model_that_goes_by_length_gains_nothing_over_length():
    train = [labelled(float(n > 5), n, f"t{n}") for n in range(1, 11)]
    held_out = [labelled(float(n > 5), n, f"h{n}", source="even" if n % 2 == 0 else "odd") for n in range(1, 11)]
    report = report_of(train, held_out, [(n - 5.5,) for n in range(1, 11)])
    assert report["accuracy"]["accuracy"] == 1
    assert report["length"]["spearman"] == pytest.approx(1)
    assert report["length"]["baseline_rule"] == "yes from 6 tokens"
    assert report["length"]["baseline"]["accuracy"] == 1
    assert report["length"]["gain_over_baseline_ci95"] == [0, 0]
    assert report["majority_floor"] == 0.5
    assert {name: own["n"] for name, own in report["by_source"].items()} == {"even": 5, "odd": 5}


def test_length_of_pairs_is_ruled_by_the_training_rows():
    def pair(name, chosen, rejected):
        return PreferencePair(
            id=name, prompt_ids=(1,), chosen_ids=tuple(range(chosen)), rejected_ids=tuple(range(rejected))
        )

    train = [pair("a", 2, 9), pair("b", 3, 9), pair("c", 9, 1)]
    held_out = [pair("d", 9, 2), pair("e", 9, 3), pair("f", 1, 3), pair("g", 4, 4)]
    report = report_of(train, held_out, [(1.0, 0.0)] * 4)
    assert report["length"]["baseline_rule"] == "the shorter"
    assert report["length"]["baseline"]["accuracy"] == 0.375, "a coin is tossed over equal lengths"
    assert "majority_floor" not in report
    assert report["calibration"]["bins"][0]["low"] == 0.5
    assert report["calibration"]["ece"] == pytest.approx(1 - 0.7310586)


def test_the_worst_come_first_and_their_texts_stay_private():
    held_out = [labelled(float(n % 2), 3 + n, f"h{n}") for n in range(14)]
    scores = [((-1) ** n * n / 10,) for n in range(14)]  # wrong everywhere, the later the more
    report = report_of(held_out, held_out, scores)
    assert [worst["id"] for worst in report["worst"]] == [f"h{n}" for n in range(13, 3, -1)]
    assert report["worst"][0]["texts"] == ["secret 17"]
    assert "secret" in render(report, texts=True)
    shown = render(report, texts=False)
    assert "secret" not in shown
    assert "| h13 | s | -1.300 | [16] |" in shown
    assert "held-out accuracy 0.000" in shown, "a score of 0 says yes, and the first target is no"


@pytest.mark.parametrize("kind", ["pairs", "rankings", "ratings", "labels", "steps"])
def test_every_kind_has_a_report(kind):
    records = judgements_of(kind, 30)
    scores = [tuple(0.1 * i - j for j in range(sum(map(len, r.reads)))) for i, r in enumerate(records[20:])]
    report = report_of(records[:20], records[20:], scores)
    assert sum(one["count"] for one in report["calibration"]["bins"]) >= 10
    assert set(report["by_source"]) == {"s0", "s1"}
    assert ("rating" in report) == (kind == "ratings")
    assert f"Reward model on {kind}, step 3" in render(report, texts=False)

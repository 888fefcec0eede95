"""Held-out rows of pairs and labels, by hand: what the table and the validation say."""

from __future__ import annotations

import math

import pytest

from alignment.judgements import LabelledAnswer
from alignment.loops.preference_stages import Judged, LabelStage, PairStage
from alignment.preference_objectives import PreferenceObjective
from alignment.preference_terms import Term
from alignment.types import PreferencePair


def pair(number: int, chosen: int = 2, rejected: int = 4, source: str = "a") -> PreferencePair:
    return PreferencePair(
        id=f"{number}",
        prompt_ids=(number, 1),
        chosen_ids=tuple(range(5, 5 + chosen)),
        rejected_ids=tuple(range(20, 20 + rejected)),
        source=source,
    )


def label(number: int, good: bool, tokens: int = 2, source: str = "a") -> LabelledAnswer:
    answer = tuple(range(5, 5 + tokens))
    return LabelledAnswer(id=f"{number}", prompt_ids=(number, 1), answer_ids=answer, target=float(good), source=source)


PAIRS = [pair(0), pair(1, source="b"), pair(2, source="b")]
REFERENCE = [[(-4.0, -4.0), (-6.0, -8.0), (-2.0, -4.0)]]
AFTER = [[(-3.0, -6.0), (-7.0, -8.0), (-3.0, -5.0)]]


def test_the_table_of_pairs():
    """Gaps of log-ratios: 3, -1, 0. Per token: before -2 against -1, -3 against -2, -1 against -1; after -1.5 against
    -1.5, -3.5 against -2, -1.5 against -1.25."""
    stage = PairStage(PreferenceObjective(beta=0.5))
    before = Judged(logps=REFERENCE, reference=REFERENCE)
    table = stage.table(PAIRS, before, Judged(logps=AFTER, reference=REFERENCE), seed=0)
    assert {name: (row["before"], pytest.approx(row["after"])) for name, row in table.items()} == {
        "implicit_accuracy": (0.5, 0.5),
        "implicit_margin": (0.0, pytest.approx(1 / 3)),
        "likelihood_accuracy": (pytest.approx(1 / 6), pytest.approx(1 / 6)),
        "implicit_accuracy/a": (0.5, 1.0),
        "implicit_margin/a": (0.0, 1.5),
        "likelihood_accuracy/a": (0.0, 0.5),
        "implicit_accuracy/b": (0.5, 0.25),
        "implicit_margin/b": (0.0, -0.25),
        "likelihood_accuracy/b": (0.25, 0.0),
    }
    assert table["implicit_margin/a"]["gain_ci95"] == [1.5, 1.5]
    assert table["implicit_accuracy"]["n"] == 3


def test_without_a_reference_there_is_the_likelihood_alone():
    stage = PairStage(PreferenceObjective(terms=(Term(kind="cpo"),)))
    judged = Judged(logps=[AFTER[0][:1]], reference=[])
    assert set(stage.table(PAIRS[:1], judged, judged, seed=0)) == {"likelihood_accuracy"}
    assert stage.metrics(PAIRS[:1], judged)["validation/loss"] == pytest.approx(math.log1p(math.exp(-0.3)))


def test_answers_are_compared_by_the_tokens_that_their_sums_count():
    """length_alpha 0: of both answers the first two tokens count."""
    stage = PairStage(PreferenceObjective(length_alpha=0.0))
    judged = Judged(logps=[[(-3.0, -4.0)]], reference=[[(0.0, 0.0)]])
    assert stage.table(PAIRS[:1], judged, judged, seed=0)["likelihood_accuracy"]["after"] == 1.0


def test_validation_of_pairs_in_closed_form():
    stage = PairStage(PreferenceObjective(beta=0.5))
    found = stage.metrics(PAIRS, Judged(logps=AFTER, reference=REFERENCE))
    losses = [math.log1p(math.exp(-0.5 * gap)) for gap in (3, -1, 0)]
    assert found["validation/loss"] == pytest.approx(sum(losses) / 3)
    assert found["validation/loss/a"] == pytest.approx(losses[0])
    assert found["validation/margin/b"] == pytest.approx(-0.25)
    assert found["validation/accuracy/b"] == 0.0


LABELS = [label(0, True), label(1, False), label(2, True, tokens=4), label(3, False), label(4, True, source="b")]


def test_the_table_of_labels():
    """Log-ratios 2, 1, 0, 0, 3: of six couples four and a half are in order; the task with one class has no row."""
    reference = [[-4.0] * 5]
    after = [[-2.0, -3.0, -4.0, -4.0, -1.0]]
    table = LabelStage(loss="bco").table(
        LABELS, Judged(logps=reference, reference=reference), Judged(logps=after, reference=reference), seed=0
    )
    aucs = {"implicit_auc", "likelihood_auc", "implicit_auc/a", "likelihood_auc/a"}
    rewards = {"desirable_reward", "undesirable_reward"}
    assert set(table) == aucs | rewards | {f"{name}/a" for name in rewards} | {"desirable_reward/b"}
    assert {name: (table[name]["before"], table[name]["after"]) for name in table if "reward" in name} == {
        "desirable_reward": (0, pytest.approx(0.1 * 5 / 3)),
        "undesirable_reward": (0, pytest.approx(0.05)),
        "desirable_reward/a": (0, pytest.approx(0.1)),
        "undesirable_reward/a": (0, pytest.approx(0.05)),
        "desirable_reward/b": (0, pytest.approx(0.3)),
    }
    assert [table[name]["higher_is_better"] for name in ("desirable_reward/b", "undesirable_reward/a")] == [
        True,
        False,
    ]
    assert (table["desirable_reward"]["n"], table["undesirable_reward"]["n"]) == (3, 2)
    assert (table["implicit_auc"]["before"], table["implicit_auc"]["after"]) == (0.5, pytest.approx(4.5 / 6))
    # Before, -2 per token of all but the one of four tokens, with -1; after, -1, -1.5, -1, -2, -0.5.
    assert table["likelihood_auc"]["before"] == pytest.approx((2 * 0.5 * 2 + 2) / 6)
    assert table["likelihood_auc"]["after"] == 1.0
    assert table["implicit_auc/a"]["after"] == pytest.approx(2.5 / 4)


@pytest.mark.parametrize("loss", ["kto", "bco"])
def test_validation_of_labels_in_closed_form(loss):
    """KTO's baseline is the mean log-ratio of mismatched answers, 0.5; BCO's shift half of the classes' means."""

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    stage = LabelStage(loss=loss, beta=0.5, undesirable_weight=2.0)
    labels = LABELS[:4]
    ratios = [2.0, 1.0, 0.0, -1.0]
    other = [1.0, 1.0, -1.0, 1.0]
    judged = Judged(logps=[ratios, other], reference=[[0.0] * 4, [0.0] * 4])
    assert [len(part) for part in stage.parts(labels)] == ([4, 4] if loss == "kto" else [4])
    found = stage.metrics(labels, judged)
    if loss == "kto":
        losses = [1 - sigmoid(0.5 * (2 - 0.5)), 2 * (1 - sigmoid(0.5 * (0.5 - 1)))]
        losses += [1 - sigmoid(0.5 * (0 - 0.5)), 2 * (1 - sigmoid(0.5 * (0.5 + 1)))]
    else:
        shift = (0.5 + 0.0) / 2  # rewards 1, 0.5, 0, -0.5
        losses = [-math.log(sigmoid(1 - shift)), -2 * math.log(sigmoid(shift - 0.5))]
        losses += [-math.log(sigmoid(0 - shift)), -2 * math.log(sigmoid(shift + 0.5))]
    assert found["validation/loss"] == pytest.approx(sum(losses) / 4)
    assert found["validation/auc"] == pytest.approx(3 / 4)
    assert found["validation/rewards/desirable"] == pytest.approx(0.5)


@pytest.mark.parametrize("loss", ["kto", "bco"])
def test_a_task_of_labels_has_its_own_loss_and_rewards(loss):
    """By the baseline, or the shift, of all held-out rows; a task of one class has what that class tells."""
    stage = LabelStage(loss=loss, beta=0.5, desirable_weight=2.0)
    judged = Judged(logps=[[2.0, 1.0, 0.0, -1.0, 3.0], [1.0] * 5], reference=[[0.0] * 5, [0.0] * 5])
    found = stage.metrics(LABELS, judged)
    assert found["validation/loss"] == pytest.approx((4 * found["validation/loss/a"] + found["validation/loss/b"]) / 5)
    shift = (0.5 * (2 + 0 + 3) / 3 + 0.5 * (1 - 1) / 2) / 2
    last = math.exp(-0.5 * (3 - 1)) if loss == "kto" else math.exp(-(1.5 - shift))
    expected = 2 * last / (1 + last) if loss == "kto" else 2 * math.log1p(last)
    assert found["validation/loss/b"] == pytest.approx(expected)
    assert found["validation/rewards/desirable/a"] == pytest.approx(0.5)
    assert found["validation/rewards/undesirable/a"] == pytest.approx(0.0, abs=1e-7)
    assert found["validation/rewards/desirable/b"] == pytest.approx(1.5)
    assert found["validation/auc/a"] == pytest.approx(3 / 4)
    assert {name for name in found if name.endswith("/b")} == {"validation/loss/b", "validation/rewards/desirable/b"}

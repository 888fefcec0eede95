"""Losses of rankings and of answers judged by themselves, against numbers worked out by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from alignment.losses import judgement_loss, ranking_loss, reward_model_loss

LN2 = math.log(2)


def ranked(scores, ranks=None, **settings):
    scores = torch.tensor(scores, dtype=torch.float64)
    ranks = torch.arange(scores.shape[1]).expand_as(scores) if ranks is None else torch.tensor(ranks)
    return ranking_loss(scores, ranks, torch.ones_like(scores, dtype=torch.bool), **settings)


def test_pairwise_is_the_mean_over_the_pairs_of_a_ranking():
    """ln(1 + e^-1) = 0.3132617 for a gap of 1, ln(1 + e^-2) = 0.1269280 for one of 2."""
    loss, metrics = ranked([[2.0, 1.0, 0.0]])
    assert loss.item() == pytest.approx((0.3132617 * 2 + 0.1269280) / 3, abs=1e-6)
    assert metrics["accuracy"].item() == 1
    assert metrics["margin"].item() == pytest.approx(4 / 3)
    reversed_loss, metrics = ranked([[0.0, 1.0, 2.0]])
    assert reversed_loss.item() == pytest.approx((1.3132617 * 2 + 2.1269280) / 3, abs=1e-6)
    assert metrics["accuracy"].item() == 0


def test_answers_that_tie_make_no_pair():
    loss, metrics = ranked([[1.0, 0.0, 3.0]], [[1, 2, 2]])
    assert loss.item() == pytest.approx((0.3132617 + 2.1269280) / 2, abs=1e-6)
    assert metrics["accuracy"].item() == 0.5


def test_plackett_luce_is_one_choice_after_the_other():
    """-ln(e^2 / (e^2 + e + 1)) - ln(e / (e + 1)) = 0.4076060 + 0.3132617."""
    assert ranked([[2.0, 1.0, 0.0]], kind="plackett_luce")[0].item() == pytest.approx(0.7208677, abs=1e-6)
    scores = [0.3, -1.2, 2.0, 0.7]
    orders = list(itertools.permutations(scores))
    likelihoods = [math.exp(-ranked([list(order)], kind="plackett_luce")[0].item()) for order in orders]
    assert sum(likelihoods) == pytest.approx(1, abs=1e-9)
    assert max(likelihoods) == likelihoods[orders.index(tuple(sorted(scores, reverse=True)))]


def test_equal_scores_give_the_uniform_likelihood():
    assert ranked([[0.5] * 4])[0].item() == pytest.approx(LN2)
    assert ranked([[0.5] * 4], kind="plackett_luce")[0].item() == pytest.approx(math.log(24))


@pytest.mark.parametrize("kind", ["pairwise", "plackett_luce"])
def test_two_answers_are_bradley_terry(kind):
    chosen, rejected = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, 3.0])
    expected, _ = reward_model_loss(chosen, rejected)
    assert expected.item() == pytest.approx(0.7732235, abs=1e-6)
    loss, _ = ranked(torch.stack([chosen, rejected], 1).tolist(), kind=kind)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    centred, _ = reward_model_loss(chosen, rejected, center_coef=0.01)
    if kind == "pairwise":
        loss, _ = ranked(torch.stack([chosen, rejected], 1).tolist(), center_coef=0.01)
        assert loss.item() == pytest.approx(centred.item(), abs=1e-6)


@pytest.mark.parametrize("kind", ["pairwise", "plackett_luce"])
def test_padding_of_short_rankings_shows_nowhere(kind):
    whole, _ = ranked([[1.0, -1.0]], kind=kind)
    scores = torch.tensor([[1.0, -1.0, float("nan"), 9.0]], dtype=torch.float64, requires_grad=True)
    ranks, mask = torch.tensor([[1, 2, 0, 7]]), torch.tensor([[True, True, False, False]])
    loss, metrics = ranking_loss(scores, ranks, mask, kind=kind)
    assert loss.item() == whole.item()
    loss.backward()
    assert torch.isfinite(scores.grad).all()
    assert (scores.grad[0, 2:] == 0).all()
    assert scores.grad[0, 0] < 0 < scores.grad[0, 1]
    assert metrics["margin"].item() == 2


@pytest.mark.parametrize("kind", ["pairwise", "plackett_luce"])
def test_parts_of_rankings_add_up(kind):
    scores = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    whole, all_metrics = ranked(scores.tolist(), kind=kind)
    parts = [ranked(scores[rows].tolist(), kind=kind, denominator=5) for rows in (slice(0, 1), slice(1, 5))]
    assert sum(loss.item() for loss, _ in parts) == pytest.approx(whole.item(), rel=1e-9)
    for name, value in all_metrics.items():
        assert sum(metrics[name].item() for _, metrics in parts) == pytest.approx(value.item(), rel=1e-6)


def test_what_has_no_likelihood_is_refused():
    with pytest.raises(ValueError, match="plackett_luce: got answers that tie"):
        ranked([[1.0, 0.0, 3.0]], [[1, 2, 2]], kind="plackett_luce")
    with pytest.raises(ValueError, match="plackett_luce: got answers that tie, or a center_coef"):
        ranked([[1.0, 0.0]], kind="plackett_luce", center_coef=0.1)
    with pytest.raises(ValueError, match=r"kind: got 'listwise', expected one of \('pairwise', 'plackett_luce'\)"):
        ranked([[1.0, 0.0]], kind="listwise")
    with pytest.raises(ValueError, match=r"kind: got 'mse', expected one of \('cross_entropy', 'squared'\)"):
        judgement_loss(torch.zeros(2), torch.zeros(2), kind="mse")
    with pytest.raises(ValueError, match="shapes: got"):
        judgement_loss(torch.zeros(3), torch.zeros(3, 1))


SCORES, TARGETS = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.25])


def test_cross_entropy_of_judgements():
    """ln(1 + e^-2) = 0.1269280; 0.25 ln(1 + e) + 0.75 ln(1 + e^-1) = 0.5632617."""
    loss, metrics = judgement_loss(SCORES, TARGETS)
    assert loss.item() == pytest.approx((0.1269280 + 0.5632617) / 2, abs=1e-6)
    weighted, _ = judgement_loss(SCORES, TARGETS, weights=torch.tensor([1.0, 0.5]))
    assert weighted.item() == pytest.approx((0.1269280 + 0.5 * 0.5632617) / 1.5, abs=1e-6)
    assert metrics["accuracy"].item() == 1
    assert metrics["error"].item() == pytest.approx((0.1192029 + 0.0189414) / 2, abs=1e-6)
    assert judgement_loss(torch.zeros(1), torch.tensor([1.0]))[0].item() == pytest.approx(LN2)


def test_squared_error_of_judgements():
    """(sigmoid(2) - 1)^2 = 0.0142094, (sigmoid(-1) - 0.25)^2 = 0.0003588."""
    assert judgement_loss(SCORES, TARGETS, kind="squared")[0].item() == pytest.approx(0.0072841, abs=1e-6)


@pytest.mark.parametrize("kind", ["cross_entropy", "squared"])
def test_the_mean_of_the_raters_is_where_a_rating_costs_least(kind):
    target = torch.tensor([0.3])
    score = target.logit().requires_grad_()
    judgement_loss(score, target, kind=kind)[0].backward()
    assert score.grad.item() == pytest.approx(0, abs=1e-6)
    for shift in (-0.5, 0.5):
        moved = (target.logit() + shift).requires_grad_()
        judgement_loss(moved, target, kind=kind)[0].backward()
        assert math.copysign(1, moved.grad.item()) == math.copysign(1, shift)


def test_the_middle_of_a_judgement_is_above_it():
    _, metrics = judgement_loss(torch.tensor([0.0, 0.0, -0.1]), torch.tensor([0.5, 0.4, 0.49]))
    assert metrics["accuracy"].item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("kind", ["cross_entropy", "squared"])
def test_parts_of_judgements_add_up(kind):
    scores, targets = torch.linspace(-2, 2, 7), torch.linspace(0, 1, 7)
    weights = torch.linspace(1, 0.4, 7)
    whole, all_metrics = judgement_loss(scores, targets, weights=weights, kind=kind)
    total = weights.sum().item()
    parts = [
        judgement_loss(scores[rows], targets[rows], weights=weights[rows], kind=kind, denominator=total)
        for rows in (slice(0, 2), slice(2, 7))
    ]
    assert sum(loss.item() for loss, _ in parts) == pytest.approx(whole.item(), rel=1e-5)
    for name, value in all_metrics.items():
        assert sum(metrics[name].item() for _, metrics in parts) == pytest.approx(value.item(), rel=1e-5)


def test_extreme_scores_cost_what_they_should_and_stay_finite():
    score = torch.tensor([-1e4], requires_grad=True)
    loss, _ = judgement_loss(score, torch.tensor([1.0]))
    loss.backward()
    assert loss.item() == pytest.approx(1e4)
    assert score.grad.item() == pytest.approx(-1)

"""KTO and BCO against golden arrays and closed forms; batches of one class; the advice on balance (P36, P37)."""

from __future__ import annotations

import math

import pytest
import torch

from alignment.label_losses import RewardShift, imbalance, mismatched_kl
from alignment.losses import bco_loss, kto_loss

REWARDS = torch.tensor([2.0, 1.0, -1.0, 3.0])
GOOD = torch.tensor([True, True, False, False])
ZERO = torch.zeros(4)
LOSSES = [kto_loss, bco_loss]


@pytest.mark.parametrize(
    ("samples", "weight", "each", "mean"),
    [
        ([-1.0, 0.5, 0.2, -0.1], 1.0, [0.450166, 0.4750208, 0.4750208, 0.5744425], 0.4936625),
        ([1.0, 0.5, 0.2, 0.3], 1.0, [0.4625702, 0.4875026, 0.4625702, 0.5621765], 0.4937049),
        ([1.0, 0.5, 0.2, 0.3], 1.33, None, 0.5782465),
    ],
)
def test_kto_golden(samples, weight, each, mean):
    baseline = mismatched_kl(torch.tensor(samples), ZERO)
    settings = {"beta": 0.1, "undesirable_weight": weight}
    loss, metrics = kto_loss(REWARDS, ZERO, GOOD, baseline, **settings)
    assert loss.item() == pytest.approx(mean, abs=1e-6)
    if each is not None:
        rows = [slice(i, i + 1) for i in range(4)]
        alone = [kto_loss(REWARDS[i], ZERO[i], GOOD[i], baseline, **settings)[0].item() for i in rows]
        assert alone == pytest.approx(each, abs=1e-6)
    told = {name: value.item() for name, value in metrics.items()}
    assert told == pytest.approx(
        {"kl": max(0.0, sum(samples) / 4), "logps": 1.25, "rewards/desirable": 0.15, "rewards/undesirable": 0.1},
        abs=1e-6,
    )


def test_at_the_reference_every_kto_loss_is_half_its_weight():
    loss, _ = kto_loss(REWARDS, REWARDS, GOOD, 0.0, beta=0.1, desirable_weight=1.2, undesirable_weight=0.6)
    assert loss.item() == pytest.approx((1.2 + 0.6) / 4)


def test_bco_by_hand():
    """Logits 0.2 - 0.05, 0.1 - 0.05, and with the sign turned -0.1 - 0.05, 0.3 - 0.05."""
    logits = [0.15, 0.05, 0.15, -0.25]
    loss, metrics = bco_loss(REWARDS, ZERO, GOOD, 0.05, beta=0.1)
    assert loss.item() == pytest.approx(sum(math.log1p(math.exp(-x)) for x in logits) / 4, abs=1e-6)
    assert metrics["reward_shift"].item() == pytest.approx(0.05)
    weighted, _ = bco_loss(REWARDS, ZERO, GOOD, 0.05, beta=0.1, desirable_weight=0.0, undesirable_weight=3.0)
    assert weighted.item() == pytest.approx(3 * sum(math.log1p(math.exp(-x)) for x in logits[2:]) / 4, abs=1e-6)


def test_the_baseline_is_detached_and_not_below_zero():
    logps = torch.tensor([-1.0, 2.0], requires_grad=True)
    baseline = mismatched_kl(logps, torch.zeros(2))
    assert not baseline.requires_grad
    assert baseline.item() == 0.5
    handed = torch.tensor(0.5, requires_grad=True)
    loss, _ = kto_loss(logps, torch.zeros(2), GOOD[1:3], handed, beta=0.1)
    loss.backward()
    assert handed.grad is None
    below = kto_loss(REWARDS, ZERO, GOOD, torch.tensor(-7.0), beta=0.1)[0]
    assert below.item() == kto_loss(REWARDS, ZERO, GOOD, 0.0, beta=0.1)[0].item()


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_finite_differences(loss):
    logps = REWARDS.double().requires_grad_()
    settings = {"beta": 0.7, "desirable_weight": 1.2, "undesirable_weight": 0.8}
    assert torch.autograd.gradcheck(lambda x: loss(x, ZERO.double(), GOOD, 0.4, **settings)[0], logps)


def test_gradient_of_kto_in_closed_form():
    """Desirable: -w beta s (1 - s) / n with s = sigmoid(beta (r - z0)); undesirable with the sign turned."""
    logps = REWARDS.double().requires_grad_()
    kto_loss(logps, ZERO.double(), GOOD, 0.5, beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)[0].backward()
    s = torch.sigmoid(0.3 * (REWARDS.double() - 0.5))
    expected = torch.where(GOOD, -1.5, 0.5) * 0.3 * s * (1 - s) / 4
    torch.testing.assert_close(logps.grad, expected)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("label", [True, False])
def test_a_batch_of_one_class_is_finite(loss, label):
    logps = (REWARDS * 1e4).requires_grad_()
    value, metrics = loss(logps, ZERO, torch.full((4,), label), 0.3, beta=0.1)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(logps.grad).all()
    assert ("rewards/desirable" in metrics, "rewards/undesirable" in metrics) == (label, not label)
    assert all(torch.isfinite(metric) for metric in metrics.values())


@pytest.mark.parametrize("loss", LOSSES)
def test_weights_are_linear_and_no_answer_is_repeated(loss):
    """Doubling a weight doubles what its class adds, and leaves the other's gradient bitwise alone (P37)."""

    def gradient(**weights):
        logps = REWARDS.clone().requires_grad_()
        value, _ = loss(logps, ZERO, GOOD, 0.4, beta=0.1, **weights)
        value.backward()
        return value.item(), logps.grad

    (one, plain), (two, heavier) = gradient(), gradient(undesirable_weight=2.0)
    assert torch.equal(heavier[GOOD], plain[GOOD])
    assert torch.equal(heavier[~GOOD], 2 * plain[~GOOD])
    only_good, _ = gradient(undesirable_weight=0.0)
    assert two - one == pytest.approx(one - only_good, rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("sizes", [(1, 3), (2, 2), (4,)])
def test_parts_of_a_batch_add_up(loss, sizes):
    settings = {"beta": 0.3, "undesirable_weight": 1.3}
    whole, metrics = loss(REWARDS, ZERO, GOOD, 0.4, **settings)
    parts = [
        loss(REWARDS[i], ZERO[i], GOOD[i], 0.4, denominator=4, num_desirable=2, **settings)
        for i in torch.arange(4).split(list(sizes))
    ]
    assert sum(value.item() for value, _ in parts) == pytest.approx(whole.item(), rel=1e-6)
    for name, value in metrics.items():
        assert sum(part[name].item() for _, part in parts) == pytest.approx(value.item(), rel=1e-6)
    samples = torch.tensor([-1.0, 0.5, 0.2, 5.0])
    shares = [mismatched_kl(samples[i], ZERO[i], denominator=4) for i in torch.arange(4).split(list(sizes))]
    assert sum(shares).item() == pytest.approx(mismatched_kl(samples, ZERO).item())


def test_refusals():
    with pytest.raises(ValueError, match="num_desirable: got None with denominator 8"):
        kto_loss(REWARDS, ZERO, GOOD, 0.0, beta=0.1, denominator=8)
    with pytest.raises(ValueError, match="shapes: got"):
        kto_loss(REWARDS, ZERO, GOOD.unsqueeze(1), 0.0, beta=0.1)
    with pytest.raises(ValueError, match="shapes: got"):
        mismatched_kl(REWARDS, ZERO[:1])


def test_the_reward_shift_is_half_of_both_classes_and_runs():
    shift = RewardShift(decay=0.75)
    assert shift.value == 0
    shift.update(desirable=2.0, undesirable=None)
    assert shift.value == 2
    shift.update(desirable=4.0, undesirable=-1.0)
    assert (shift.desirable, shift.undesirable) == (2.5, -1.0)
    assert shift.value == 0.75
    again = RewardShift(decay=0.75)
    again.load_state_dict(shift.state_dict())
    assert again == shift


def test_the_shift_is_the_threshold_at_which_a_classifier_of_equal_spread_is_best():
    """Rewards N(3, 1) and N(1, 1): the shift is 2, where both kinds of error are as likely; there the loss of a shift
    has its minimum for classes of one size."""
    draw = torch.Generator().manual_seed(0)
    rewards = torch.cat([3 + torch.randn(4000, generator=draw), 1 + torch.randn(4000, generator=draw)])
    good = torch.arange(8000) < 4000
    shift = RewardShift()
    shift.update(desirable=rewards[good].mean().item(), undesirable=rewards[~good].mean().item())
    zero = torch.zeros(8000)
    losses = [bco_loss(rewards, zero, good, shift.value + d, beta=1.0)[0].item() for d in (-0.3, 0.0, 0.3)]
    assert losses[1] < min(losses[0], losses[2])
    assert shift.value == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize(
    ("counts", "weights", "due"),
    [
        ((100, 100), (1.0, 1.0), False),
        ((133, 100), (1.0, 1.0), False),
        ((100, 100), (4 / 3, 1.0), False),
        ((134, 100), (1.0, 1.0), True),
        ((99, 100), (1.0, 1.0), True),
        ((10, 100), (1.0, 1.0), True),
        ((10, 100), (10.0, 1.0), False),
        ((10, 100), (1.0, 0.1), False),
        ((0, 100), (1.0, 1.0), True),
        ((100, 0), (1.0, 1.0), True),
        ((100, 100), (1.0, 0.0), True),
    ],
)
def test_imbalance_is_told_where_it_is(counts, weights, due):
    text = imbalance(*counts, desirable_weight=weights[0], undesirable_weight=weights[1])
    assert (text is not None) == due


def test_following_the_advice_ends_it():
    text = imbalance(10, 90)
    assert text is not None
    assert "got 10 desirable answers and 90 undesirable ones, which count 0.111 to 1, expected 1 to 1.33" in text
    assert "set desirable_weight to 9 .. 12, or undesirable_weight to 0.0833 .. 0.111" in text
    for weights in ({"desirable_weight": 9}, {"desirable_weight": 12}, {"undesirable_weight": 0.0834}):
        assert imbalance(10, 90, **weights) is None

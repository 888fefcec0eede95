"""The paired bootstrap against closed forms."""

import math

import pytest
import torch

from alignment.bootstrap import paired_bootstrap


def normal_pairs(n: int, gain: float, seed: int = 0) -> tuple[list[float], list[float]]:
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(n, generator=generator, dtype=torch.float64) * 10
    after = before + gain + torch.randn(n, generator=generator, dtype=torch.float64)
    return before.tolist(), after.tolist()


@pytest.mark.parametrize("n", [48, 400])
@pytest.mark.parametrize(("level", "t"), [(0.95, {48: 2.0117, 400: 1.9659}), (0.5, {48: 0.6796, 400: 0.6752})])
def test_agrees_with_the_t_interval_on_normal_data(n, level, t):
    before, after = normal_pairs(n, gain=0.3)
    gains = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    half = t[n] * float(gains.std()) / math.sqrt(n)
    gain, low, high = paired_bootstrap(before, after, level=level)
    assert gain == pytest.approx(float(gains.mean()), abs=1e-12)
    assert (low - gain, high - gain) == pytest.approx((-half, half), rel=0.08)


def test_pairing_cancels_the_spread_between_items():
    before, after = normal_pairs(48, gain=0.5)
    _, low, high = paired_bootstrap(before, after)
    assert 0 < low < 0.5 < high < 1.0


def test_whole_groups_are_resampled():
    before, after = normal_pairs(100, gain=0.3)
    _, low, high = paired_bootstrap(before, after)
    alone = paired_bootstrap(before, after, groups=list(range(100)))
    assert alone[1:] == (low, high)
    # Every item four times over: nothing more is known, and the interval says so.
    names = [k for k in range(100) for _ in range(4)]
    fourfold = [[value for value in values for _ in range(4)] for values in (before, after)]
    _, grouped_low, grouped_high = paired_bootstrap(*fourfold, groups=names)
    assert (grouped_low, grouped_high) == pytest.approx((low, high), abs=1e-9)
    _, naive_low, naive_high = paired_bootstrap(*fourfold)
    assert naive_high - naive_low == pytest.approx((high - low) / 2, rel=0.08)


def test_the_mean_is_that_of_items_whatever_their_groups():
    gain, low, high = paired_bootstrap([0, 0, 0], [1, 1, 0], groups=["a", "a", "b"])
    assert gain == pytest.approx(2 / 3)
    assert (low, high) == (0.0, 1.0)
    with pytest.raises(ValueError, match="got 2 groups for 3 items"):
        paired_bootstrap([0, 0, 0], [1, 1, 0], groups=["a", "b"])


def test_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for seed in range(200):
        before, after = normal_pairs(48, gain=0.2, seed=seed)
        _, low, high = paired_bootstrap(before, after, num_resamples=400, seed=seed)
        covered += low <= 0.2 <= high
    assert 180 <= covered <= 198  # 0.95 of 200, give or take three standard deviations


def test_edge_cases():
    assert paired_bootstrap([1.5], [2.0]) == (0.5, 0.5, 0.5)
    assert paired_bootstrap([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == (0.0, 0.0, 0.0)
    assert paired_bootstrap([1.0, 2.0], [1.25, 2.25]) == (0.25, 0.25, 0.25)
    assert paired_bootstrap([0.0, 0.0], [0.0, 1.0]) == (0.5, 0.0, 1.0)


def test_order_of_the_arguments_is_the_sign():
    before, after = normal_pairs(20, gain=1.0)
    gain, low, high = paired_bootstrap(before, after)
    assert paired_bootstrap(after, before) == pytest.approx((-gain, -high, -low), abs=1e-12)


def test_seed_decides_and_chunks_do_not(monkeypatch):
    before, after = normal_pairs(30, gain=0.1)
    once = paired_bootstrap(before, after, seed=3)
    assert paired_bootstrap(before, after, seed=3) == once
    assert paired_bootstrap(before, after, seed=4) != once
    monkeypatch.setattr("alignment.bootstrap.CHUNK", 30 * 7)
    assert paired_bootstrap(before, after, seed=3) == pytest.approx(once, abs=0.02)


@pytest.mark.parametrize(
    ("before", "after", "options"),
    [
        ([], [], {}),
        ([1.0], [1.0, 2.0], {}),
        ([1.0, math.nan], [1.0, 2.0], {}),
        ([1.0, 1.0], [1.0, math.inf], {}),
        ([1.0], [1.0], {"level": 1.0}),
        ([1.0], [1.0], {"num_resamples": 0}),
    ],
)
def test_refusals(before, after, options):
    with pytest.raises(ValueError, match=r"got .*expected"):
        paired_bootstrap(before, after, **options)

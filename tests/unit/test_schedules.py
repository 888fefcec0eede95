"""The learning-rate schedule at its ends and in between, and the KL-adaptive factor."""

import math

import pytest

from alignment.schedules import KlAdaptiveRate, lr_factor


def factors(total: int, warmup: float = 0.0, decay: str = "linear", floor: float = 0.0) -> list[float]:
    return [
        lr_factor(i, total_updates=total, warmup_ratio=warmup, decay=decay, min_lr_ratio=floor) for i in range(total)
    ]


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("total", [2, 3, 10, 97])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_first_update_learns_and_the_last_reaches_the_floor(decay, total, warmup, floor):
    """P41, with a rise that never falls and a decay that never rises."""
    rates = factors(total, warmup, decay, floor)
    assert rates[0] > 0
    assert max(rates) == 1.0
    num_rising = round(warmup * total)
    if decay == "constant" or num_rising == total:
        assert rates[-1] == 1.0
    else:
        assert rates[-1] == pytest.approx(floor, abs=1e-12)
    rising, falling = rates[:num_rising], rates[max(num_rising - 1, 0) :]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)


def test_linear_golden():
    assert factors(6, warmup=1 / 3, floor=0.2) == pytest.approx([0.5, 1.0, 0.8, 0.6, 0.4, 0.2])
    assert factors(5) == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])


def test_cosine_golden():
    expected = [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0.0]
    assert factors(5, decay="cosine") == pytest.approx(expected)
    assert factors(5, decay="cosine", floor=0.1) == pytest.approx([0.1 + 0.9 * left for left in expected])


def test_warmup_over_the_whole_run_rises_to_the_peak():
    assert factors(4, warmup=1.0) == [0.25, 0.5, 0.75, 1.0]


def test_a_run_of_one_update_uses_the_peak():
    for warmup in (0.0, 1.0):
        for decay in ("constant", "linear", "cosine"):
            assert factors(1, warmup, decay) == [1.0]


def test_updates_past_the_end_stay_at_the_floor():
    for decay in ("linear", "cosine"):
        late = lr_factor(500, total_updates=10, warmup_ratio=0.1, decay=decay, min_lr_ratio=0.25)
        assert late == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decay": "exponential"}, "got 'exponential', expected constant, linear or cosine"),
        ({"update_index": -1}, "got -1 and 10"),
        ({"total_updates": 0}, "got 0 and 0"),
        ({"warmup_ratio": 3.0}, "got 3.0 and 0.1, expected shares"),
        ({"min_lr_ratio": -0.1}, "expected shares"),
    ],
)
def test_schedule_refusals(change, message):
    arguments = {"update_index": 0, "total_updates": 10, "warmup_ratio": 0.1, "decay": "linear", "min_lr_ratio": 0.1}
    with pytest.raises(ValueError, match=message):
        lr_factor(**{**arguments, **change})


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(0.0, 1.5), (0.0049, 1.5), (0.005, 1.0), (0.01, 1.0), (0.02, 1.0), (0.0201, 2 / 3), (9.0, 2 / 3)],
)
def test_adaptive_rate_moves_outside_half_to_twice_the_target(kl, expected):
    rate = KlAdaptiveRate(0.01, (0.1, 4.0))
    assert rate.value == 1.0
    assert rate.update(kl) == pytest.approx(expected)
    assert rate.value == pytest.approx(expected)


def test_adaptive_rate_keeps_its_bounds():
    rate = KlAdaptiveRate(0.01, (0.25, 4.0), factor=2.0)
    assert [rate.update(1.0) for _ in range(4)] == [0.5, 0.25, 0.25, 0.25]
    assert [rate.update(0.0) for _ in range(6)] == [0.5, 1.0, 2.0, 4.0, 4.0, 4.0]
    assert KlAdaptiveRate(0.01, (2.0, 4.0)).value == 2.0


def test_adaptive_rate_takes_nan_for_too_far():
    assert KlAdaptiveRate(0.01, (0.1, 4.0)).update(math.nan) == pytest.approx(2 / 3)


def test_adaptive_rate_brings_a_quadratic_kl_into_the_band():
    """KL = (rate)^2 is what small steps do; the band is [target / 2, 2 target]."""
    rate = KlAdaptiveRate(0.02, (0.01, 10.0))
    for _ in range(20):
        rate.update(rate.value**2)
    assert 0.01 <= rate.value**2 <= 0.04


def test_adaptive_rate_resumes_within_the_new_bounds():
    rate = KlAdaptiveRate(0.01, (0.1, 4.0))
    rate.update(1.0)
    resumed = KlAdaptiveRate(0.01, (0.1, 4.0))
    resumed.load_state_dict(rate.state_dict())
    assert resumed.value == rate.value
    narrower = KlAdaptiveRate(0.01, (0.9, 1.1))
    narrower.load_state_dict(rate.state_dict())
    assert narrower.value == 0.9


@pytest.mark.parametrize(
    "arguments", [(0.0, (0.1, 4.0)), (0.01, (0.0, 4.0)), (0.01, (2.0, 1.0)), (0.01, (0.1, 4.0), 1.0)]
)
def test_adaptive_rate_refusals(arguments):
    with pytest.raises(ValueError, match="adaptive rate: got"):
        KlAdaptiveRate(*arguments)

"""When proxy and gold part, and the softer signs: by numbers, and by runs that are simulated."""

from __future__ import annotations

import json
import math

import pytest
import torch

from alignment.config import HackingConfig
from alignment.hacking import HackingWatch, change_of_mean, duplicate_shares, find_parting, student_quantile

WINDOW, RATE = HackingConfig().window, HackingConfig().false_alarm_rate
GOLD = "gold/rule"


@pytest.mark.parametrize(
    ("tail", "degrees", "expected"),
    [(0.025, 2, 4.302653), (0.05, 4, 2.131847), (0.025, 10, 2.228139), (0.0005, 18, 3.921646), (0.5, 8, 0.0)],
)
def test_quantiles_are_those_of_the_tables(tail, degrees, expected):
    """Abramowitz and Stegun (1964), table 26.10."""
    assert student_quantile(tail, degrees) == pytest.approx(expected, abs=1e-5)


def test_the_interval_of_a_change_is_worked_out_by_hand():
    """Means 2 and 5, variances 1 and 4: the error of the difference is sqrt(5 / 3)."""
    change = change_of_mean([1.0, 2.0, 3.0], [3.0, 5.0, 7.0], tail=0.05)
    margin = 2.131847 * math.sqrt(5 / 3)
    assert (change.mean, change.low, change.high) == pytest.approx((3.0, 3 - margin, 3 + margin), abs=1e-5)


def test_rounding_is_no_change():
    change = change_of_mean([0.1] * 5, [0.1 + 1e-16] * 5, tail=0.05)
    assert change.low < 0 < change.high


def ramp(start: float, end: float, *, wobble: float = 0.01) -> list[float]:
    """Two stretches, each of numbers that differ a little."""
    return [mean + wobble * (-1) ** i for mean in (start, end) for i in range(WINDOW)]


@pytest.mark.parametrize(
    ("proxy", "gold", "parts"),
    [
        (ramp(0, 1), ramp(1, 0), True),
        (ramp(0, 1), ramp(0, 1), False),
        (ramp(1, 0), ramp(1, 0), False),
        (ramp(0, 0), ramp(1, 0), False),
        (ramp(0, 1), ramp(1, 1), False),
        (ramp(0, 1), ramp(1, 0, wobble=2.0), False),
        (ramp(0, 1)[:-1], ramp(1, 0)[:-1], False),
    ],
    ids=["parts", "both rise", "both fall", "proxy stays", "gold stays", "gold is noise", "half a stretch"],
)
def test_they_part_where_the_proxy_rises_and_the_gold_falls(proxy, gold, parts):
    found = find_parting(proxy, gold, window=WINDOW, false_alarm_rate=RATE)
    assert (found is not None) == parts
    if found is not None:
        assert (found.early, found.late) == (range(10), range(10, 20))
        assert (found.proxy.mean, found.gold.mean) == pytest.approx((1.0, -1.0))


def test_a_gold_that_rose_first_is_compared_with_its_peak():
    """Its fall ends above where the run began."""
    gold = [*ramp(0.0, 1.0), *ramp(0.5, 0.5)[:WINDOW]]
    proxy = [*ramp(0.0, 1.0), *ramp(2.0, 2.0)[:WINDOW]]
    found = find_parting(proxy, gold, window=WINDOW, false_alarm_rate=RATE)
    assert found is not None
    assert (found.early, found.late, found.gold.mean) == (range(10, 20), range(20, 30), pytest.approx(-0.5))


def alarms(proxy: torch.Tensor, gold: torch.Tensor) -> list[int]:
    """(runs, steps) -> in each run the step at which the warning first comes, or the number of steps."""
    steps = range(2 * WINDOW, gold.shape[1] + 1, WINDOW)
    return [
        next(
            (n for n in steps if find_parting(p[:n], g[:n], window=WINDOW, false_alarm_rate=RATE) is not None),
            gold.shape[1] + 1,
        )
        for p, g in zip(proxy.tolist(), gold.tolist(), strict=True)
    ]


NUM_RUNS, NUM_STEPS = 300, 120


@pytest.mark.parametrize("kind", ["normal", "few answers of a rule", "gold against proxy"])
def test_less_than_one_in_twenty_runs_without_a_change_of_gold_is_alarmed(kind):
    """The proxy rises as it should, so that gold alone keeps the alarm away. Two in a hundred are allowed for."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(NUM_RUNS, NUM_STEPS, generator=generator)
    gold = noise
    if kind == "few answers of a rule":  # four answers a step, each 0 or 1
        gold = torch.rand(NUM_RUNS, NUM_STEPS, 4, generator=generator).lt(0.85).double().mean(2)
    shared = -noise if kind == "gold against proxy" else torch.randn(NUM_RUNS, NUM_STEPS, generator=generator)
    proxy = torch.linspace(0, 20, NUM_STEPS) + shared
    alarmed = sum(step <= NUM_STEPS for step in alarms(proxy, gold))
    assert alarmed < 0.05 * NUM_RUNS


def test_a_run_that_is_optimised_too_far_is_told_after_the_gold_has_turned():
    """Gold of Gao et al. (2023): d (a - b log d) over the root d of the KL, which turns at d = exp(a / b - 1)."""
    generator = torch.Generator().manual_seed(0)
    d = torch.linspace(0.05, 6.0, NUM_STEPS)
    a, b = 0.12, 0.08
    turn = int((d < math.exp(a / b - 1)).sum())
    gold = d * (a - b * d.log()) + 0.05 * torch.randn(100, NUM_STEPS, generator=generator)
    proxy = 0.3 * d + 0.05 * torch.randn(100, NUM_STEPS, generator=generator)
    found = alarms(proxy, gold)
    assert turn == 32
    assert min(found) > turn
    assert sorted(found)[95] <= NUM_STEPS


@pytest.mark.parametrize(
    ("responses", "prompts", "across", "within"),
    [
        (["Rest.", "rest. ", "Walk."], ["a", "b", "c"], 2 / 3, None),
        (["Rest.", "Rest.", "Walk.", "Run."], ["a", "a", "b", "b"], 0.0, 0.5),
        (["Rest.", "Rest.", "Rest.", "Run."], ["a", "a", "b", "b"], 0.75, 0.5),
        (["a b", "a\n b", "ab"], ["a", "b", "c"], 2 / 3, None),
        (["", " "], ["a", "b"], 1.0, None),
        (["x"], ["a"], 0.0, None),
    ],
)
def test_duplicates_are_counted_among_prompts_and_within_one(responses, prompts, across, within):
    assert duplicate_shares(responses, prompts) == (pytest.approx(across), within)


def watch(**changes: object) -> HackingWatch:
    settings = {
        "gold": [GOLD],
        "window": 3,
        "false_alarm_rate": 0.05,
        "length_factor": 2.0,
        "duplicate_share": 0.25,
        "clipped_share": 0.5,
        "unscored_gold_share": 0.1,
    }
    return HackingWatch(**{**settings, **changes})  # type: ignore[arg-type]


def step(i: int, **changes: float) -> dict[str, float]:
    """The metrics of a step in which nothing happens."""
    quiet = {
        "kl/per_sequence": float(i * i),
        "reward/mean": 0.1 * (-1) ** i,
        f"reward/{GOLD}/mean": 0.5 + 0.01 * (-1) ** i,
        f"reward/{GOLD}/unscored_count": 0.0,
        "rollout/length": 20.0,
        "rollout/duplicate_share": 0.0,
        "reward/clipped_share": 0.0,
    }
    return {**quiet, **{name.replace("__", "/"): value for name, value in changes.items()}}


def begun(one: HackingWatch, rows: list[dict[str, float]]) -> list[list[str]]:
    return [one.observe(row, 8) for row in rows]


def test_a_quiet_run_is_told_nothing():
    one = watch()
    assert begun(one, [step(i) for i in range(30)]) == [[]] * 30
    signs = ["parted", "gold_unscored", "length", "duplicates", "clipped"]
    assert one.metrics() == {"rollout/length_drift": 1.0, **{f"hacking/{sign}": 0.0 for sign in signs}}
    assert one.summary() == {sign: {"holds": False, "began": []} for sign in signs}


@pytest.mark.parametrize(
    ("sign", "changes", "first", "told"),
    [
        ("length", {"rollout__length": 80.0}, 7, "answers have 60 tokens, and had 20 in the first 3 steps"),
        ("length", {"rollout__length": 2.0}, 7, "answers have 8 tokens, and had 20"),
        ("duplicates", {"rollout__duplicate_share": 0.5}, 7, "33% of the answers of the last 3 steps equal one to"),
        ("clipped", {"reward__clipped_share": 1.0}, 7, "67% of the scores of the last 3 steps are cut by a clip"),
        ("gold_unscored", {f"reward__{GOLD}__unscored_count": 2.0}, 7, "no number for 17% of the answers"),
    ],
)
def test_a_softer_sign_is_told_once_and_again_only_after_it_went_away(sign, changes, first, told):
    one = watch()
    assert begun(one, [step(i) for i in range(6)]) == [[]] * 6
    assert begun(one, [step(6, **changes)]) == [[]]
    assert begun(one, [step(7, **changes)]) == [[sign]]
    assert told in one.holding[sign]
    assert one.metrics()[f"hacking/{sign}"] == 1.0
    assert begun(one, [step(8, **changes)]) == [[]]
    assert begun(one, [step(i) for i in range(9, 12)]) == [[]] * 3
    assert one.metrics()[f"hacking/{sign}"] == 0.0
    assert begun(one, [step(12, **changes), step(13, **changes)]) == [[], [sign]]
    assert one.summary()[sign] == {"holds": True, "began": [7, 13]}


def test_duplicates_that_were_there_from_the_start_are_the_tasks():
    one = watch()
    assert begun(one, [step(i, rollout__duplicate_share=0.9) for i in range(9)]) == [[]] * 9


def hacked(i: int) -> dict[str, float]:
    """From step 6 on the proxy is up and the gold down."""
    late = float(i >= 6)
    numbers = {"reward__mean": late + 0.01 * (-1) ** i, f"reward__{GOLD}__mean": 0.9 - 0.7 * late + 0.01 * (-1) ** i}
    return step(i, **numbers)


def test_the_parting_is_told_when_its_stretch_is_complete_and_where_it_was():
    one = watch()
    assert begun(one, [hacked(i) for i in range(12)]) == [[]] * 8 + [["parted"]] + [[]] * 3
    text = one.holding["parted"]
    assert text.startswith("proxy and gold part: from steps ")
    assert f" and {GOLD} by -0.7" in text
    again = watch()
    begun(again, [hacked(i) for i in range(9)])
    # Mean KLs 5 / 3 and (36 + 49 + 64) / 3; steps 0-2 have the higher gold.
    assert "from steps 0-2 to 6-8 the reward changed by +1" in again.holding["parted"]
    assert "the square root of the KL went from 1.29 to 7.05" in again.holding["parted"]


def test_a_step_without_numbers_is_passed_over():
    """No answer was scored, or the KL is not a number: the next steps fill the stretch."""
    one = watch()
    rows = [hacked(i) for i in range(9)]
    empty = {"rollout/length": 20.0, "rollout/duplicate_share": 0.0}
    signs = begun(one, [*rows[:4], empty, *rows[4:7], step(7, **{"kl/per_sequence": math.nan}) | rows[7], rows[8]])
    assert [i for i, sign in enumerate(signs) if "parted" in sign] == [9]
    assert "to 7-9 the reward" in one.holding["parted"]


def test_a_watch_that_was_saved_goes_on_to_the_last_bit():
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(20, generator=generator).tolist()
    rows = [{**hacked(i), "rollout/length": 20 + 60 * noise[i], "reward/clipped_share": 0.9} for i in range(20)]
    whole, first = watch(), watch()
    signs = begun(whole, rows)
    assert signs[2] == ["clipped"]  # and holds from then on
    assert begun(first, rows[:7]) == signs[:7]
    second = watch()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun(second, rows[7:]) == signs[7:]
    assert second.state_dict() == whole.state_dict()
    assert (second.metrics(), second.summary()) == (whole.metrics(), whole.summary())


def test_several_gold_parts_share_the_rate_of_false_alarms():
    """At half the tail the margin is wider: a fall between the two is told of one gold, not of one among two."""
    rise = [0.0, 0.01, 0.02, 1.0, 1.01, 1.02]
    margins = [student_quantile(rate / 2, 4) * math.sqrt(2 * 0.01**2 / 3) for rate in (0.05, 0.025)]
    fall = sum(margins) / 2
    gold = [x - fall * (i >= 3) for i, x in enumerate([0.5, 0.51, 0.52] * 2)]
    rows = [step(i, **{"reward__mean": rise[i], f"reward__{GOLD}__mean": gold[i]}) for i in range(6)]
    assert begun(watch(), rows)[-1] == ["parted"]
    two = [{**row, "reward/gold/other/mean": 1.0, "reward/gold/other/unscored_count": 0.0} for row in rows]
    assert begun(watch(gold=[GOLD, "gold/other"]), two)[-1] == []

"""When an engine comes and when one goes."""

from __future__ import annotations

from actors.engine_scaling import Scaling


def course(shares: list[int], least: int = 1, most: int = 3) -> list[int]:
    """The number of engines in each step, where every change is at once."""
    scaling, engines, seen = Scaling(least, most), least, []
    for num_shares in shares:
        scaling.note(num_shares, engines)
        seen.append(engines)
        engines += scaling.decide()
    return seen


def test_grows_while_shares_wait_and_not_beyond_the_most():
    assert course([8] * 8) == [1, 1, 2, 2, 3, 3, 3, 3]
    # One more would have nothing to do.
    assert course([3] * 8) == [1, 1, 2, 2, 2, 2, 2, 2]
    assert course([1] * 4) == [1, 1, 1, 1]


def test_shrinks_when_there_is_not_a_share_for_each():
    assert course([8] * 4 + [1] * 6) == [1, 1, 2, 2, 3, 3, 2, 2, 1, 1]
    assert course([8] * 4 + [2] * 4, least=2, most=3) == [2, 2, 3, 3, 3, 3, 2, 2]


def test_one_odd_step_changes_nothing():
    assert course([8, 1] * 4) == [1] * 8


def test_no_number_of_shares_makes_engines_come_and_go():
    for num_shares in range(1, 40):
        seen = course([num_shares] * 60, most=20)
        assert seen == sorted(seen)
        assert num_shares / seen[-1] <= 1.5 or seen[-1] == 20


def test_a_step_without_a_measurement_decides_nothing():
    scaling = Scaling(1, 3)
    scaling.note(8, 1)
    assert [scaling.decide(), scaling.decide()] == [0, 0]
    assert scaling.queue == 7

"""Several reward models' scores as one: closed forms, invariances, refusals."""

from __future__ import annotations

import itertools

import pytest

from alignment.ensembles import score_ensemble

MEMBERS = [[1.0, 0.1, -3.0], [2.0, 0.2, 5.0], [6.0, 0.3, 1e-9]]


def test_closed_forms():
    """Of 1, 2, 6: mean 3, standard deviation sqrt(14 / 3)."""
    found = score_ensemble(MEMBERS)
    assert found.scores[0] == 3
    assert found.disagreement[0] == pytest.approx((14 / 3) ** 0.5)
    assert score_ensemble(MEMBERS, how="min").scores == [1.0, 0.1, -3.0]
    assert score_ensemble(MEMBERS, how="mean_minus_std", std_coef=0.5).scores[0] == pytest.approx(
        3 - 0.5 * (14 / 3) ** 0.5
    )
    assert score_ensemble(MEMBERS, how="mean_minus_std", std_coef=0).scores == found.scores


@pytest.mark.parametrize("how", ["mean", "min", "mean_minus_std"])
def test_one_alone_is_itself_and_order_does_not_matter(how):
    for member in MEMBERS:
        alone = score_ensemble([member], how=how, std_coef=3)
        assert alone.scores == member
        assert alone.disagreement == [0.0, 0.0, 0.0]
        thrice = score_ensemble([member] * 3, how=how, std_coef=3)
        assert thrice.scores == pytest.approx(member, rel=1e-12)
    first = score_ensemble(MEMBERS, how=how)
    assert all(score_ensemble(order, how=how) == first for order in itertools.permutations(MEMBERS))


@pytest.mark.parametrize("how", ["mean", "min", "mean_minus_std"])
def test_an_answer_does_not_depend_on_the_others(how):
    together = score_ensemble(MEMBERS, how=how)
    apart = [score_ensemble([[member[i]] for member in MEMBERS], how=how) for i in range(3)]
    assert together.scores == [one.scores[0] for one in apart]
    assert together.disagreement == [one.disagreement[0] for one in apart]


def test_what_one_member_cannot_score_nobody_has():
    found = score_ensemble([[1.0, None], [2.0, 3.0]])
    assert found.scores == [1.5, None]
    assert found.disagreement == [0.5, None]


@pytest.mark.parametrize(
    ("members", "settings", "reason"),
    [
        ([], {}, r"members: got scores of \[\] answers"),
        ([[1.0], [1.0, 2.0]], {}, r"members: got scores of \[1, 2\] answers"),
        ([[1.0], [float("nan")]], {}, "expected finite numbers"),
        ([[float("inf")], [None]], {}, "expected finite numbers"),
        ([[1.0]], {"how": "median"}, "how: got 'median'"),
        ([[1.0]], {"std_coef": -1.0}, "std_coef: got -1.0"),
    ],
)
def test_refusals(members, settings, reason):
    with pytest.raises(ValueError, match=reason):
        score_ensemble(members, **settings)

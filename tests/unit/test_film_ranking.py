"""Places among candidates by hand and by closed forms, and the baselines against direct computation."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import pytest
import torch

from alignment.bootstrap import paired_bootstrap
from alignment.data.recommendation_cases import RecommendationCase, weighted_sample
from alignment.recommendation_baselines import ItemNeighbours
from alignment.recommendation_metrics import chance, gain_report, hit_rate_at_k, mean_by_user, ndcg_at_k
from alignment.recommendation_report import case_metrics, gains, means, scores_by


def metrics(positive, negatives, k):
    own, others = torch.tensor([float(positive)]), torch.tensor([negatives], dtype=torch.float32)
    return hit_rate_at_k(own, others, k=k).item(), ndcg_at_k(own, others, k=k).item()


@pytest.mark.parametrize(
    ("positive", "k", "hit", "ndcg"),
    [
        (9, 3, 1, 1),  # first
        (3.5, 3, 1, 1 / math.log2(3)),  # second
        (2.5, 3, 1, 0.5),  # third
        (1.5, 3, 0, 0),  # fourth
        (0, 3, 0, 0),
        (4, 1, 1 / 2, 1 / 2),  # first or second
        (4, 3, 1, (1 + 1 / math.log2(3)) / 2),
        (1, 4, 1 / 2, 1 / math.log2(5) / 2),  # fourth or fifth
    ],
)
def test_places_by_hand(positive, k, hit, ndcg):
    assert metrics(positive, [4, 3, 2, 1], k) == pytest.approx((hit, ndcg), abs=1e-12)


def test_equal_scores_are_the_mean_over_all_orders():
    """Against every order of five candidates, three of which have the positive's score."""
    scores, k = [2.0, 2.0, 5.0, 2.0, 1.0], 2
    hits, gains = [], []
    for order in itertools.permutations(range(5)):
        ranked = sorted(order, key=lambda i: -scores[i])  # stable: equal scores stay in this order
        rank = ranked.index(0) + 1
        hits.append(rank <= k)
        gains.append(1 / math.log2(rank + 1) if rank <= k else 0)
    expected = sum(hits) / len(hits), sum(gains) / len(gains)
    assert metrics(scores[0], scores[1:], k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("k", [1, 10, 100, 200])
def test_a_model_that_says_nothing_is_worth_as_much_as_chance(k):
    assert metrics(0, [0.0] * 99, k) == pytest.approx(chance(100, k=k), abs=1e-12)


def test_chance_by_closed_form():
    assert chance(100, k=10) == pytest.approx((0.1, 0.04543559338), abs=1e-9)
    assert chance(4, k=10)[0] == 1


def test_scores_count_by_their_order_alone():
    draw = torch.Generator().manual_seed(0)
    positive, negatives = torch.randn(50, generator=draw), torch.randn(50, 99, generator=draw)
    shuffled = negatives[:, torch.randperm(99, generator=draw)]
    for metric in (hit_rate_at_k, ndcg_at_k):
        expected = metric(positive, negatives, k=10)
        assert torch.equal(metric(positive.exp() * 3, shuffled.exp() * 3, k=10), expected)


def test_endless_scores_have_a_place_and_those_that_are_no_number_are_refused():
    assert metrics(-math.inf, [0.0, 1.0], 2) == (0, 0)
    assert metrics(math.inf, [0.0, math.inf], 1) == (0.5, 0.5)
    with pytest.raises(ValueError, match="NaN"):
        metrics(0, [math.nan, 1.0], 2)
    with pytest.raises(ValueError, match="expected \\(C,\\)"):
        hit_rate_at_k(torch.zeros(2), torch.zeros(3, 4), k=1)


def test_a_person_counts_once_however_many_cases():
    before, after = torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 0.0, 1.0])
    users = [7, 7, 9, 3]
    assert mean_by_user(before, users) == [0.5, 0.0, 1.0]
    report = gain_report(before, after, users, seed=4)
    _, low, high = paired_bootstrap([0.5, 0.0, 1.0], [1.0, 0.0, 1.0], seed=4)
    assert report == {
        "before": 0.5,
        "after": pytest.approx(2 / 3),
        "n": 3,
        "gain_ci95": [low, high],
        "higher_is_better": True,
    }


LIKES = [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (3, 0), (3, 3), (4, 1), (4, 2)]


@pytest.mark.parametrize("shrinkage", [0.0, 10.0])
def test_neighbours_are_those_of_a_direct_computation(shrinkage):
    people = {item: {user for user, i in LIKES if i == item} for item in range(5)}

    def alike(i, j):
        lengths = math.sqrt(len(people[i]) * len(people[j])) + shrinkage
        return len(people[i] & people[j]) / lengths if lengths and i != j else 0.0

    model = ItemNeighbours(LIKES, shrinkage=shrinkage)
    expected = [sum(alike(candidate, item) for item in (0, 2)) for candidate in (1, 3, 4)]
    assert model.scores([0, 2, 4], [1, 3, 4]) == pytest.approx(expected, abs=1e-12)
    nearest = ItemNeighbours(LIKES, shrinkage=shrinkage, neighbours=1)
    best = max((0, 2, 3), key=lambda item: alike(1, item))
    assert nearest.scores([0, 2, 3], [1]) == pytest.approx([alike(1, best)], abs=1e-12)


def test_a_table_without_likes_is_refused():
    with pytest.raises(ValueError, match="and 0 likes"):
        ItemNeighbours([])


CASES = [
    RecommendationCase(user=1, liked=(9,), positive=5, uniform=(6, 7), popular=(7, 8)),
    RecommendationCase(user=2, liked=(9,), positive=8, uniform=(6, 5), popular=(4, 3)),
    RecommendationCase(user=1, liked=(9, 5), positive=6, uniform=(7, 8), popular=(8, 7)),
]


def test_scores_find_their_protocol():
    """A film that both protocols have is scored once; cases of one person share a mean."""
    assert CASES[0].films == (5, 6, 7, 8)
    scores = [[2, 3, 1, 0], [0, 1, 1, 0, -1], [1, 0, 0]]
    metrics = case_metrics(CASES, scores, k=1)
    assert {name: values.tolist() for name, values in metrics.items() if "hit" in name} == {
        "uniform/hit_rate": [0, 0, 1],
        "popular/hit_rate": [1, 0.5, 1],
    }
    assert means(CASES, metrics)["uniform/hit_rate"] == 0.25
    same = scores_by(lambda liked, films: [float(len(liked) + film) for film in films], CASES)
    assert same[2] == [8, 9, 10]
    rows = gains(CASES, metrics, case_metrics(CASES, same, k=1), seed=0)
    assert (rows["popular/hit_rate"]["before"], rows["popular/hit_rate"]["after"]) == (0.75, 0.5)
    assert rows["popular/hit_rate"]["n"] == 2
    with pytest.raises(ValueError, match="zip"):
        case_metrics(CASES, [*scores[:2], [1]], k=1)


def test_weighted_draws_follow_the_weights():
    """First draws in proportion to the weights; second ones in proportion among the rest (exact, by hand)."""
    weights, draw = {1: 6, 2: 3, 3: 1}, random.Random(0)
    drawn = [weighted_sample(weights, 2, draw) for _ in range(20_000)]
    first = Counter(pair[0] for pair in drawn)
    assert [first[item] / 20_000 for item in weights] == pytest.approx([0.6, 0.3, 0.1], abs=0.015)
    pairs = Counter(drawn)
    assert pairs[1, 2] / 20_000 == pytest.approx(0.6 * 3 / 4, abs=0.015)
    assert pairs[3, 1] / 20_000 == pytest.approx(0.1 * 6 / 9, abs=0.01)
    assert len(set(weighted_sample(weights, 3, draw))) == 3

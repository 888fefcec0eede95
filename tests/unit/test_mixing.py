"""Shares, permutations, and that both are functions of their arguments alone."""

from __future__ import annotations

import random

import pytest

from alignment.data.mixing import apportion, epoch_order, next_source


def sequence(count: int, weights: list[float]) -> list[int]:
    taken = [0] * len(weights)
    order = []
    for _ in range(count):
        order.append(next_source(taken, weights))
        taken[order[-1]] += 1
    return order


def test_the_first_samples_by_hand():
    assert sequence(8, [1, 1]) == [0, 1, 0, 1, 0, 1, 0, 1]
    # Sample i of a source stands at (i + 1/2) / weight: 1/6 3/6 5/6 7/6 ... against 1/2 3/2 ...; equal goes first.
    assert sequence(8, [3, 1]) == [0, 0, 1, 0, 0, 0, 1, 0]
    assert sequence(5, [2.0]) == [0] * 5


WEIGHTS = [[1.0], [0.5, 0.5], [0.7, 0.2, 0.1], [1, 1000], [3, 1, 4, 1, 5, 9, 2, 6], [1e-6, 1, 1, 1, 1e3]]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_counts_are_those_of_the_sequence_wherever_it_is_entered(weights):
    order = sequence(3000, weights)
    for count in [*range(50), 777, 2048, 3000]:
        assert apportion(count, weights) == [order[:count].count(source) for source in range(len(weights))]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_any_window_has_the_exact_shares_up_to_rounding(weights):
    choice = random.Random(1)
    for _ in range(200):
        start, length = choice.randrange(10**9), choice.randrange(1, 10**6)
        before, after = apportion(start, weights), apportion(start + length, weights)
        assert sum(after) - sum(before) == length
        for source, weight in enumerate(weights):
            exact = length * weight / sum(weights)
            assert abs(after[source] - before[source] - exact) <= 1 + len(weights) / 2


def test_scaled_weights_are_the_same_mixture():
    assert all(apportion(n, [1, 2, 4]) == apportion(n, [256, 512, 1024]) for n in range(500))


def test_an_epoch_is_a_permutation_of_its_own():
    orders = [epoch_order(1000, f"{seed}:{epoch}") for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order) == list(range(1000))
        assert sum(abs(int(a) - b) < 20 for b, a in enumerate(order)) < 100  # 40 expected of a shuffle
    assert len({tuple(order) for order in orders}) == 4
    assert epoch_order(0, "x").tolist() == []
    assert epoch_order(1, "x").tolist() == [0]


def test_the_order_of_an_epoch_never_changes_between_versions():
    assert epoch_order(8, "17:0:0").tolist() == [4, 6, 1, 2, 7, 3, 5, 0]


def by_hand(count: int, name: str) -> list[int]:
    """SplitMix64 in whole numbers, as its authors print it."""
    import hashlib

    state = int(hashlib.sha1(name.encode()).hexdigest()[:16], 16)
    hashes = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        mixed = state
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
        hashes.append(mixed ^ (mixed >> 31))
    return sorted(range(count), key=hashes.__getitem__)


@pytest.mark.parametrize("name", ["17:0:0", "0:3:99"])
def test_the_hash_is_splitmix(name):
    assert epoch_order(500, name).tolist() == by_hand(500, name)

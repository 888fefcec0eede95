"""Which pairs a step learns from."""

from __future__ import annotations

from collections import Counter

import pytest

from alignment.replay import replay_batch

ROUNDS = [[f"{number}.{i}" for i in range(size)] for number, size in enumerate((3, 4, 5))]


def batches(rounds, steps=4, share=0.5, seed=1):
    return [replay_batch(rounds, s, batch_size=4, replay_share=share, seed=seed) for s in range(steps)]


def test_golden():
    assert batches(ROUNDS, steps=2) == [["2.2", "1.2", "2.3", "0.1"], ["2.0", "0.0", "2.4", "0.2"]]


def test_a_step_is_a_function_of_its_arguments_and_seeds_and_rounds_differ():
    assert batches(ROUNDS)[3] == replay_batch(ROUNDS, 3, batch_size=4, replay_share=0.5, seed=1)
    assert batches(ROUNDS) != batches(ROUNDS, seed=2)
    same = [ROUNDS[0], ROUNDS[0]]
    assert batches([*same, ROUNDS[0]], share=0.0) != batches(same, share=0.0)


@pytest.mark.parametrize(("share", "earlier"), [(0.0, 0), (0.25, 5), (0.4, 8), (0.5, 10)])
def test_shares_are_exact_over_a_round(share, earlier):
    picked = [pair for batch in batches(ROUNDS, steps=5, share=share) for pair in batch]
    assert sum(not pair.startswith("2.") for pair in picked) == earlier


def test_epochs_take_every_pair_once_before_any_twice():
    own = Counter(pair for batch in batches(ROUNDS, steps=5, share=0.0) for pair in batch)
    assert own == dict.fromkeys(ROUNDS[2], 4)
    both = [pair for batch in batches(ROUNDS, steps=4) for pair in batch if not pair.startswith("2.")]
    assert len(both) == 8
    assert set(both[:7]) == {*ROUNDS[0], *ROUNDS[1]}


def test_without_earlier_pairs_all_are_the_rounds_own():
    for rounds in ([ROUNDS[0]], [[], ROUNDS[0]]):
        assert {pair for batch in batches(rounds) for pair in batch} == set(ROUNDS[0])

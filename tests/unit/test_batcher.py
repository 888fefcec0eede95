"""What waits while a batch is computed is computed together next; each caller gets its own numbers."""

from __future__ import annotations

import threading

import pytest

from rewards.batcher import Batcher, BusyError
from rewards.layouts import PaddedRows, SharedPrefixes

TIMEOUT = 30


class Gate:
    """Scores a sequence by its sum, one batch each time it is opened; remembers the batches."""

    def __init__(self) -> None:
        self.batches: list[list[list[int]]] = []
        self.entered, self.open = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, sequences):
        self.batches.append([list(ids) for ids in sequences])
        self.entered.release()
        assert self.open.acquire(timeout=TIMEOUT)
        return [float(sum(ids)) for ids in sequences]

    def let(self, batches: int) -> None:
        for _ in range(batches):
            self.open.release()


def make(score, **changes) -> Batcher:
    settings = {
        "layout": PaddedRows(),
        "max_rows": 4,
        "max_tokens": 100,
        "max_wait": 0.0,
        "max_waiting": 100,
    } | changes
    return Batcher(score, **settings)


def results(futures) -> list[float]:
    return [future.result(TIMEOUT) for future in futures]


def test_what_waits_shares_the_next_batches_by_length():
    gate = Gate()
    batcher = make(gate)
    first = batcher.submit([[1]])
    assert gate.entered.acquire(timeout=TIMEOUT)
    others = [batcher.submit([[n] * length]) for n, length in enumerate([40, 2, 30, 3, 1, 60, 2, 200], start=1)]
    assert batcher.unfinished == 9
    gate.let(6)
    assert results(first) == [1.0]
    assert [results(one) for one in others] == [[40.0], [4.0], [90.0], [12.0], [5.0], [360.0], [14.0], [1600.0]]
    assert [[len(ids) for ids in batch] for batch in gate.batches] == [[1], [1, 2, 2, 3], [30, 40], [60], [200]]
    batcher.close()
    assert batcher.unfinished == 0


def test_a_full_batch_does_not_wait_for_company():
    for sequences in ([[1]] * 4, [[1] * 100]):
        batcher = make(lambda rows: [0.0] * len(rows), max_wait=1e6)
        assert results(batcher.submit(sequences)) == [0.0] * len(sequences)
        batcher.close()


def test_what_begins_alike_shares_a_batch_and_is_counted_once():
    gate, told = Gate(), []
    batcher = make(gate, layout=SharedPrefixes(), max_tokens=10, on_batch=lambda *batch: told.append(batch[:2]))
    batcher.submit([[0]])
    assert gate.entered.acquire(timeout=TIMEOUT)
    question, other = [7, 7, 7, 7, 7], [8, 8, 8]
    answers = [[*question, 1], [*other, 1, 2], [*question, 2, 3], [*other, 3], [*question, 1, 4]]
    futures = batcher.submit(answers)
    gate.let(3)
    assert results(futures) == [float(sum(ids)) for ids in answers]
    assert gate.batches[1:] == [[answers[0], answers[4], answers[2]], [answers[1], answers[3]]]
    assert told == [(1, 1), (3, 9), (2, 6)]
    batcher.close()


def test_requests_that_come_side_by_side_wait_for_company():
    gate = Gate()
    batcher = make(gate, max_wait=1e6)
    first = batcher.submit([[1]] * 4)
    assert gate.entered.acquire(timeout=TIMEOUT)
    beside = batcher.submit([[3], [4]])
    gate.let(2)
    assert results(first) == [1.0] * 4
    beside += batcher.submit([[5], [6]])
    assert results(beside) == [3.0, 4.0, 5.0, 6.0]
    assert [len(batch) for batch in gate.batches] == [4, 4]
    # Requests that shared a batch are likely to come together again.
    assert gate.entered.acquire(timeout=TIMEOUT)
    again = batcher.submit([[7]])
    assert not gate.entered.acquire(timeout=0.2)
    gate.let(1)
    again += batcher.submit([[8], [9], [10]])
    assert results(again) == [7.0, 8.0, 9.0, 10.0]
    batcher.close()


def test_who_is_known_to_ask_alone_does_not_wait():
    batcher = make(lambda rows: [float(len(ids)) for ids in rows], max_wait=1e6)
    assert results(batcher.submit([[0]] * 4)) == [1.0] * 4
    for length in (1, 2, 3):
        assert results(batcher.submit([[0] * length])) == [float(length)]
    batcher.close()


def test_no_more_wait_than_there_is_room_for():
    gate = Gate()
    batcher = make(gate, max_waiting=3)
    kept = batcher.submit([[1], [2]])
    with pytest.raises(BusyError, match="2 responses wait"):
        batcher.submit([[3], [4]])
    kept += batcher.submit([[3]])
    gate.let(3)
    assert results(kept) == [1.0, 2.0, 3.0]
    batcher.close()
    with pytest.raises(BusyError):
        batcher.submit([[1]])


def test_closing_scores_what_waits():
    batcher = make(lambda rows: [float(len(ids)) for ids in rows], max_wait=1e6)
    futures = batcher.submit([[1, 1]])
    batcher.close()
    assert results(futures) == [2.0]
    assert not batcher.alive


def test_a_failure_reaches_those_of_its_batch_alone_and_the_next_are_scored():
    def score(sequences):
        if [9] in [list(ids) for ids in sequences]:
            raise RuntimeError("out of memory")
        return [float(ids[0]) for ids in sequences]

    batcher = make(score, max_rows=1)
    futures = batcher.submit([[1], [9], [2]])
    assert futures[0].result(TIMEOUT) == 1.0
    with pytest.raises(RuntimeError, match="out of memory"):
        futures[1].result(TIMEOUT)
    assert futures[2].result(TIMEOUT) == 2.0
    batcher.close()


def test_a_number_too_few_is_nobodys_number():
    batcher = make(lambda rows: [7.0] * (len(rows) - 1))
    with pytest.raises(ValueError, match="shorter"):
        batcher.submit([[1], [2]])[1].result(TIMEOUT)
    batcher.close()


def test_who_does_not_wait_any_more_is_not_scored():
    gate = Gate()
    told = []
    batcher = make(gate, on_batch=lambda *batch: told.append(batch[:2]))
    first = batcher.submit([[1]])
    assert gate.entered.acquire(timeout=TIMEOUT)
    gone, stays = batcher.submit([[5, 5]])[0], batcher.submit([[6]])
    assert gone.cancel()
    gate.let(2)
    assert results([*first, *stays]) == [1.0, 6.0]
    batcher.close()
    assert gate.batches == [[[1]], [[6]]]
    assert told == [(1, 1), (1, 1)]

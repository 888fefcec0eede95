"""What waits while a batch is computed is computed together next; each caller gets its own numbers."""

from __future__ import annotations

import threading

import pytest

from rewards.batcher import Batcher, BusyError

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
    settings = {"max_rows": 4, "max_tokens": 100, "max_wait": 0.0, "max_waiting": 100} | changes
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


def test_one_that_is_not_full_waits_for_company():
    gate = Gate()
    gate.let(1)
    batcher = make(gate, max_wait=1e6)
    futures = batcher.submit([[1], [2]])
    futures += batcher.submit([[3], [4]])
    assert results(futures) == [1.0, 2.0, 3.0, 4.0]
    assert len(gate.batches) == 1
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

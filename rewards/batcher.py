"""One forward for responses of several requests: what waits while the model computes is scored together next."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from rewards.layouts import Ids, Layout, batch_tokens

Score = Callable[[Sequence[Ids]], Sequence[float]]


class BusyError(RuntimeError):
    """More waits already than is taken in, or the batcher is closed."""


@dataclass(slots=True, eq=False)
class _Waiting:
    ids: Ids
    arrived: float
    future: Future[float] = field(default_factory=Future)


class Batcher:
    """A thread that scores sequences in batches, those together that are cheap together."""

    def __init__(
        self,
        score: Score,
        *,
        layout: Layout,
        max_rows: int,
        max_tokens: int,
        max_wait: float,
        max_waiting: int,
        on_batch: Callable[[int, int, float], None] = lambda rows, tokens, seconds: None,
    ) -> None:
        """
        Args:
            score: sequences of ids -> a number for each, in one forward.
            layout: how `score` lays them out.
            max_rows: sequences of a batch.
            max_tokens: tokens that a batch computes; a longer sequence is a batch of its own.
            max_wait: seconds that a sequence waits for company where the model is idle and requests come side by
                side.
            max_waiting: sequences that may wait; `submit` takes no more.
            on_batch: told of each batch: rows, tokens computed, seconds.
        """
        self._score, self._layout, self._on_batch = score, layout, on_batch
        self._max_rows, self._max_tokens, self._max_wait = max_rows, max_tokens, max_wait
        self._max_waiting = max_waiting
        self._waiting: list[_Waiting] = []
        self._unfinished = 0
        self._requests = 0  # that wait
        self._company = True  # whether requests come side by side: whoever asks alone need not wait for another
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="reward-batches", daemon=True)
        self._thread.start()

    @property
    def unfinished(self) -> int:
        """Sequences that wait or are being scored."""
        return self._unfinished

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, sequences: Sequence[Sequence[int]]) -> list[Future[float]]:
        """A future per sequence, in order. All are taken, or none.

        Raises:
            BusyError: too many wait, or the batcher is closed.
        """
        now = time.monotonic()
        added = [_Waiting(ids, now) for ids in sequences]
        with self._changed:
            if self._closed or self._unfinished + len(added) > self._max_waiting:
                raise BusyError(f"{self._unfinished} responses wait")
            self._company = self._company or self._unfinished > 0
            self._requests += bool(added)
            self._waiting += added
            self._unfinished += len(added)
            self._changed.notify()
        return [one.future for one in added]

    def close(self) -> None:
        """Score what waits, take nothing more, return when that is done."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while pool := self._next():
            for batch in self._batches(pool):
                self._compute(batch)

    def _next(self) -> list[_Waiting]:
        """All that waits, once there is a full batch or the first has waited long enough; nothing when closed.

        Clients that come side by side send anew when they are answered, all at once, so the first of them waits a
        little. One that comes alone gets its answer before it sends anew.
        """

        def full() -> bool:
            tokens = sum(len(one.ids) for one in self._waiting)
            return self._closed or len(self._waiting) >= self._max_rows or tokens >= self._max_tokens

        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._waiting and self._company:
                left = self._waiting[0].arrived + self._max_wait - time.monotonic()
                self._changed.wait_for(full, timeout=max(0.0, left))
            pool, self._waiting = self._waiting, []
            self._company, self._requests = self._requests > 1, 0
            return pool

    def _batches(self, pool: list[_Waiting]) -> Iterator[list[_Waiting]]:
        """Neighbours in the layout's order share a batch."""
        batch: list[_Waiting] = []
        tokens = 0
        for one in sorted(pool, key=lambda one: self._layout.order(one.ids)):
            grown = self._layout.grown(tokens, [other.ids for other in batch], one.ids)
            if batch and (len(batch) == self._max_rows or grown > self._max_tokens):
                yield batch
                batch, grown = [], self._layout.grown(0, [], one.ids)
            batch.append(one)
            tokens = grown
        yield batch

    def _compute(self, batch: list[_Waiting]) -> None:
        wanted = [one for one in batch if one.future.set_running_or_notify_cancel()]
        scored: list[tuple[_Waiting, float]] = []
        failure: Exception | None = None
        try:
            if wanted:
                scored = list(zip(wanted, self._timed([one.ids for one in wanted]), strict=True))
        except Exception as error:  # whoever waits for the answer raises it
            failure = error
        with self._changed:  # before the answers, which bring the next requests
            self._unfinished -= len(batch)
        for one, score in scored:
            one.future.set_result(score)
        if failure is not None:
            for one in wanted:
                one.future.set_exception(failure)

    def _timed(self, sequences: list[Ids]) -> Sequence[float]:
        began = time.monotonic()
        scores = self._score(sequences)
        self._on_batch(len(sequences), batch_tokens(self._layout, sequences), time.monotonic() - began)
        return scores

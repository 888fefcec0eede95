"""One forward for responses of several requests: what waits while the model computes is scored together next."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

Score = Callable[[Sequence[Sequence[int]]], Sequence[float]]


class BusyError(RuntimeError):
    """More waits already than is taken in, or the batcher is closed."""


@dataclass(slots=True, eq=False)
class _Waiting:
    ids: Sequence[int]
    arrived: float
    future: Future[float] = field(default_factory=Future)


class Batcher:
    """A thread that scores sequences in batches of similar length."""

    def __init__(
        self,
        score: Score,
        *,
        max_rows: int,
        max_tokens: int,
        max_wait: float,
        max_waiting: int,
        on_batch: Callable[[int, int, float], None] = lambda rows, tokens, seconds: None,
    ) -> None:
        """
        Args:
            score: sequences of ids -> a number for each, in one forward.
            max_rows: sequences of a batch.
            max_tokens: tokens of a batch, padding included; a longer sequence is a batch of its own.
            max_wait: seconds that a sequence waits for company where the model is idle.
            max_waiting: sequences that may wait; `submit` takes no more.
            on_batch: told of each batch: rows, tokens with padding, seconds.
        """
        self._score, self._on_batch = score, on_batch
        self._max_rows, self._max_tokens, self._max_wait = max_rows, max_tokens, max_wait
        self._max_waiting = max_waiting
        self._waiting: list[_Waiting] = []
        self._unfinished = 0
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
        """All that waits, once there is a full batch or the first has waited long enough; nothing when closed."""

        def full() -> bool:
            tokens = len(self._waiting) * max((len(one.ids) for one in self._waiting), default=0)
            return self._closed or len(self._waiting) >= self._max_rows or tokens >= self._max_tokens

        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._waiting:
                left = self._waiting[0].arrived + self._max_wait - time.monotonic()
                self._changed.wait_for(full, timeout=max(0.0, left))
            pool, self._waiting = self._waiting, []
            return pool

    def _batches(self, pool: list[_Waiting]) -> Iterator[list[_Waiting]]:
        """Neighbours in length share a batch."""
        batch: list[_Waiting] = []
        for one in sorted(pool, key=lambda one: len(one.ids)):
            if batch and (len(batch) == self._max_rows or (len(batch) + 1) * len(one.ids) > self._max_tokens):
                yield batch
                batch = []
            batch.append(one)
        yield batch

    def _compute(self, batch: list[_Waiting]) -> None:
        began = time.monotonic()
        wanted = [one for one in batch if one.future.set_running_or_notify_cancel()]
        try:
            if wanted:
                scores = self._score([one.ids for one in wanted])
                self._on_batch(len(wanted), len(wanted) * len(wanted[-1].ids), time.monotonic() - began)
                for one, score in zip(wanted, scores, strict=True):
                    one.future.set_result(score)
        except Exception as error:  # whoever waits for the answer raises it
            for one in wanted:
                if not one.future.done():
                    one.future.set_exception(error)
        finally:
            with self._changed:
                self._unfinished -= len(batch)

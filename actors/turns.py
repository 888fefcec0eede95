"""Whose turn an engine is: the run's own calls, or requests from outside."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


class NotReadyError(RuntimeError):
    """The engine has no complete weights, and did not get them in time."""


class Turns:
    """One user of the engine at a time. The run goes first; requests wait while they are held off.

    A weight sync is several calls of the run: between them the engine is free and its weights are torn. The run holds
    requests off from the first to the last of them.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._busy = False
        self._run_waits = False
        self._held_off = False
        self._closed = False
        self.waiting = 0
        """Threads that wait for the engine."""

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        """A call of the run: after the request under way, before all that wait."""
        with self._changed:
            self._run_waits = True
            self._wait(lambda: not self._busy, None)
            self._run_waits, self._busy = False, True
        yield from self._until_done()

    @contextlib.contextmanager
    def request(self, *, timeout: float) -> Iterator[None]:
        """A request, once the run leaves the engine alone.

        Raises:
            NotReadyError: it did not within `timeout` seconds, or the actor stops.
        """
        with self._changed:
            free = self._wait(lambda: self._closed or self._request_may_start(), timeout)
            if self._closed or not free:
                raise NotReadyError(f"got no turn on complete weights within {timeout:g} s, expected a free engine")
            self._busy = True
        yield from self._until_done()

    def hold_off(self) -> None:
        """Let no request start before `let_in`."""
        with self._changed:
            self._held_off = True

    def let_in(self) -> None:
        with self._changed:
            self._held_off = False
            self._changed.notify_all()

    def close(self) -> None:
        """Turn away the requests that wait, and all that come."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _wait(self, until: Callable[[], bool], timeout: float | None) -> bool:
        self.waiting += 1
        try:
            return self._changed.wait_for(until, timeout)
        finally:
            self.waiting -= 1

    def _request_may_start(self) -> bool:
        return not (self._busy or self._run_waits or self._held_off)

    def _until_done(self) -> Iterator[None]:
        try:
            yield
        finally:
            with self._changed:
                self._busy = False
                self._changed.notify_all()

"""Where choices come from while a run learns: people who are replayed, HTTP, a file that grows. One log takes all."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from alignment.config.recommender import FeedbackConfig
from alignment.feedback_file import FeedbackFile
from alignment.feedback_log import FeedbackConsumer, FeedbackEvent, FeedbackLog

if TYPE_CHECKING:
    from actors.feedback_endpoint import FeedbackEndpoint

LOG_NAME = "feedback.jsonl"
"""In the run's directory."""


def check_sources(config: FeedbackConfig, output_dir: Path) -> None:
    """Refuse a port without a server, and a file that no application can write or that is the run's own.

    Raises:
        ValueError: naming it.
    """
    if config.port is not None and not all(map(importlib.util.find_spec, ("fastapi", "uvicorn"))):
        raise ValueError(
            f"live.port: got {config.port} without FastAPI and uvicorn, expected both; pip install -e '.[serve]'"
        )
    if config.file is None:
        return
    path = Path(config.file).expanduser()
    if path.is_file() and not os.access(path, os.R_OK):
        raise ValueError(f"live.file: got {path}, expected a file that this user may read; change its mode")
    if (path.exists() and not path.is_file()) or not path.parent.is_dir():
        raise ValueError(f"live.file: got {path}, expected a file in a folder that is there; correct the path")
    if path.resolve() == (output_dir / LOG_NAME).resolve():
        raise ValueError(f"live.file: got {path}, the run's own log, expected a file of an application; name another")


class Sources:
    """Open from construction to the end of its block; what is under way then comes to the disk."""

    def __init__(
        self,
        config: FeedbackConfig,
        folder: Path,
        *,
        consumer: FeedbackConsumer,
        replayed: Sequence[FeedbackEvent],
        check: Callable[[FeedbackEvent], None],
    ) -> None:
        """
        Args:
            folder: of the run, where the log lies.
            consumer: told to wait no longer where a source fails.
            replayed: choices to feed, as an application would.
            check: raises ValueError for a choice that no pair can be made of.

        Raises:
            ValueError: a log in use or damaged, a port that cannot be had.
        """
        self._stop = threading.Event()
        self._consumer = consumer
        self._check, self._ids = check, {event.id for event in replayed}
        self.log = FeedbackLog(folder / LOG_NAME)
        self.endpoint = None if config.port is None else self._listen(config.port)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="feedback-source")
        self._running: list[Future[None]] = []
        if replayed:
            self._begin(lambda: self._replay(replayed))
        if config.file is not None:
            file = FeedbackFile(Path(config.file).expanduser(), self.log, check=self._check_given)
            self._begin(lambda: file.follow(self._stop, _say, seconds=config.poll_seconds))

    def _check_given(self, event: FeedbackEvent) -> None:
        """Of an application: were one of its ids the replay's, the log would keep the one that came first."""
        if event.id in self._ids:
            raise ValueError("id: got one that a replayed choice has, expected another; change it, or do not replay")
        self._check(event)

    def _listen(self, port: int) -> FeedbackEndpoint:
        from actors.feedback_endpoint import FeedbackEndpoint

        try:
            endpoint = FeedbackEndpoint(self.log, check=self._check_given, port=port, key="live.port")
        except ValueError:
            self.log.close()
            raise
        _say(f"feedback: POST http://127.0.0.1:{endpoint.port}/feedback")
        return endpoint

    def _begin(self, work: Callable[[], None]) -> None:
        running = self._threads.submit(work)
        running.add_done_callback(self._on_end)
        self._running.append(running)

    def _on_end(self, ended: Future[None]) -> None:
        # A run that waits for a source which is gone would wait for ever.
        if not ended.cancelled() and ended.exception() is not None:
            self._consumer.stop()

    def _replay(self, events: Sequence[FeedbackEvent]) -> None:
        for event in events:
            if self._stop.is_set():
                return
            self.log.append([event])

    def require_sound(self) -> None:
        """Raise what ended a source."""
        for running in self._running:
            if running.done():
                running.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self.endpoint is not None:
            self.endpoint.close()
        self._threads.shutdown()
        self.log.close()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

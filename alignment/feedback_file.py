"""Feedback that an application appends to a file of its own, one JSON object a line, on its way into the log."""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO

from alignment.feedback_log import FeedbackEvent, FeedbackLog, event_of

LONGEST_LINE = 1 << 20


@dataclass(frozen=True, slots=True)
class Taken:
    """What came of a look at the file."""

    new: int
    known: int
    """Events that the log had already: after a restart the file is read from its beginning."""
    refused: tuple[str, ...]
    """`file:line: reason` of lines that are no event, without what they say."""


class FeedbackFile:
    """Follows a file that grows. A line counts once its end is written."""

    def __init__(self, path: Path, log: FeedbackLog, *, check: Callable[[FeedbackEvent], None]) -> None:
        """`check`: raises ValueError for an event that no pair can be made of."""
        self.path, self.log, self.check = Path(path), log, check
        self._offset, self._line = 0, 0
        self._last: tuple[int, int, bytes] | None = None
        """Device and number of the file that was read, and its last line."""

    def take(self) -> Taken:
        """Log the lines that have come since the last call.

        Raises:
            ValueError: the file has become shorter, is another one, or is gone: lines of it may have been missed. Or
                it is no regular file, such as a pipe, which cannot be read again.
        """
        try:
            # A pipe without a writer would keep `open` waiting.
            file = open(os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: SIM115
        except FileNotFoundError:
            if self._last is not None:
                raise self._no_longer("no file") from None
            return Taken(0, 0, ())
        with file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError(f"{self.path}: got no regular file, expected one that grows; name another")
            self._require_same(file)
            lines = list(takewhile(lambda line: line.endswith(b"\n"), file))
            found = os.fstat(file.fileno())
        events: dict[int, FeedbackEvent] = {}
        refused: list[str] = []
        for number, line in enumerate(lines, start=self._line + 1):
            if line.strip():
                try:
                    events[number] = self._event(line)
                except ValueError as reason:
                    refused.append(f"{self.path}:{number}: {reason}")
        new = self._append(events, refused)
        # Only now: had the disk refused, the same lines would come again.
        if lines:
            self._offset, self._line = self._offset + sum(map(len, lines)), self._line + len(lines)
            self._last = (found.st_dev, found.st_ino, lines[-1])
        return Taken(new, len(events) - new, tuple(refused))

    def _require_same(self, file: BinaryIO) -> None:
        """Go to where reading stopped, if that is still behind the line that was read last."""
        if self._last is None:
            return
        device, number, line = self._last
        found = os.fstat(file.fileno())
        if (found.st_dev, found.st_ino) != (device, number):
            raise self._no_longer("another file")
        if found.st_size < self._offset:
            raise self._no_longer(f"{found.st_size} bytes")
        file.seek(self._offset - len(line))
        if file.read(len(line)) != line:
            raise self._no_longer("other lines")

    def _no_longer(self, got: str) -> ValueError:
        return ValueError(
            f"{self.path}: got {got} where {self._offset} bytes were read, expected a file that only grows; append to "
            "it, or start again with a new one"
        )

    def follow(self, stop: threading.Event, tell: Callable[[str], None], *, seconds: float = 0.5) -> None:
        """Take until `stop` is set, and once more after it. `tell` hears of lines that are refused."""
        stopped = False
        while not stopped:
            stopped = stop.wait(seconds)
            for reason in self.take().refused:
                tell(reason)

    def _event(self, line: bytes) -> FeedbackEvent:
        if len(line) > LONGEST_LINE:
            raise ValueError(f"got {len(line)} bytes, expected at most {LONGEST_LINE}; remove the line")
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"got no JSON ({type(error).__name__}), expected an event; correct the line") from error
        event = event_of(values)
        if not self.log.has(event):
            self.check(event)
        return event

    def _append(self, events: dict[int, FeedbackEvent], refused: list[str]) -> int:
        """One by one, with one write for all where none contradicts the log. `events`: by the number of their line."""
        try:
            return self.log.append(list(events.values()))
        except ValueError:
            new = 0
            for number, event in list(events.items()):
                try:
                    new += self.log.append([event])
                except ValueError as reason:
                    del events[number]
                    refused.append(f"{self.path}:{number}: {reason}")
            return new

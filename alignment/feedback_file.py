"""Feedback that an application appends to a file of its own, one JSON object a line, on its way into the log."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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

    def take(self) -> Taken:
        """Log the lines that have come since the last call.

        Raises:
            ValueError: the file has become shorter: lines of it may have been missed.
        """
        if not self.path.exists():
            return Taken(0, 0, ())
        if self.path.stat().st_size < self._offset:
            raise ValueError(
                f"{self.path}: got {self.path.stat().st_size} bytes where {self._offset} were read, expected a file "
                "that only grows; append to it, or start again with a new one"
            )
        events: list[FeedbackEvent] = []
        refused: list[str] = []
        offset, number = self._offset, self._line
        with open(self.path, "rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                offset, number = offset + len(line), number + 1
                if line.strip():
                    try:
                        events.append(self._event(line))
                    except ValueError as reason:
                        refused.append(f"{self.path}:{number}: {reason}")
        new = self._append(events, refused)
        # Only now: had the disk refused, the same lines would come again.
        self._offset, self._line = offset, number
        return Taken(new, len(events) - new, tuple(refused))

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
        self.check(event)
        return event

    def _append(self, events: list[FeedbackEvent], refused: list[str]) -> int:
        """One by one, with one write for all where none contradicts the log."""
        try:
            return self.log.append(events)
        except ValueError:
            new = 0
            for event in list(events):
                try:
                    new += self.log.append([event])
                except ValueError as reason:
                    events.remove(event)
                    refused.append(f"{self.path}: {reason}")
            return new

"""What people chose among what they were shown, on disk: each event once, in one order, there when it is accepted.

The log is a file of JSON lines that only grows. An event's `sequence` is its place, from 0. A line is an event once it
is whole: what a kill cut short has no line end, is not read, and is cut off by the next writer. One process writes at
a time and one learner takes; how far it has come lies in its checkpoint, so that weights and place change together.
While a write is on its way nobody reads, since a disk that refuses takes it back: the file `NAME.writing` is the lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from alignment.run_directory import fsync_path

FIELDS = ("id", "user", "shown", "chosen")
LONGEST_TEXT = 500
"""Characters of a name or title."""
MOST_SHOWN = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedbackEvent:
    """One choice. Users and items are named as the application does: by number or by title."""

    id: str
    """The application's own: an event that is sent twice counts once."""
    user: str
    shown: tuple[str, ...]
    chosen: str
    """One of `shown`."""
    liked: tuple[str, ...] | None = None
    """What was known to be liked when the choice was offered, oldest first; None leaves it to the learner's table."""


@dataclass(frozen=True, slots=True)
class Logged:
    """An event and its place in the log."""

    sequence: int
    event: FeedbackEvent


class ConflictError(ValueError):
    """An id that the log has with other contents."""


def event_of(values: Any) -> FeedbackEvent:
    """An event from decoded JSON: `id`, `user`, `shown` (a list), `chosen`, and where it is known `liked` (a list).

    Raises:
        ValueError: another field, one that is missing or of another kind, less than two items shown, one shown twice,
            or a choice that was not shown.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"event: got a JSON {type(values).__name__}, expected an object with {FIELDS}; correct it")
    if unknown := sorted(set(map(str, values)) - {*FIELDS, "liked"}):
        raise ValueError(f"event: got {unknown[0][:40]!r}, expected {FIELDS} and perhaps 'liked'; remove it")
    shown, chosen = _texts(values.get("shown"), "shown"), _text(values.get("chosen"), "chosen")
    if len(shown) < 2 or len(set(shown)) < len(shown):
        raise ValueError(f"shown: got {len(shown)} items, expected at least 2, each once; correct the list")
    if chosen not in shown:
        raise ValueError("chosen: got an item that is not in shown, expected one of them; name it as shown does")
    liked = values.get("liked")
    return FeedbackEvent(
        id=_text(values.get("id"), "id"),
        user=_text(values.get("user"), "user"),
        shown=shown,
        chosen=chosen,
        liked=None if liked is None else _texts(liked, "liked"),
    )


class FeedbackLog:
    """The one writer of a log. Its methods may be called from several threads."""

    def __init__(self, path: Path) -> None:
        """Open or create the file, and cut off what a kill left of a line.

        Raises:
            ValueError: another process writes it, or it holds something else than events.
        """
        self.path = Path(path)
        self._turn = threading.Lock()
        with contextlib.ExitStack() as opened:
            self._file = _locked(self.path, "writes")
            opened.callback(os.close, self._file)
            self._readers = _opened(_writing(self.path))
            opened.callback(os.close, self._readers)
            fsync_path(self.path.parent)
            logged = list(FeedbackReader(self.path).events())
            self._known = {entry.event.id: entry.event for entry in logged}
            self._end = _end_of_lines(self._file)
            with _held(self._readers, fcntl.LOCK_EX):
                os.ftruncate(self._file, self._end)
            # What a killed writer left may not be on the disk yet, and is "known" from now on.
            os.fsync(self._file)
            opened.pop_all()

    def __len__(self) -> int:
        return len(self._known)

    def has(self, event: FeedbackEvent) -> bool:
        """Whether it was taken before, with these contents."""
        return self._known.get(event.id) == event

    def append(self, events: Sequence[FeedbackEvent]) -> int:
        """Put the events that are new at the end, all of them or, where one is refused, none. They are on the disk
        when it returns; a kill before that may leave the first of them.

        Returns:
            How many were new. One that the log has already is passed over.

        Raises:
            ConflictError: an id that is known with other contents; nothing of the call is written.
            OSError: the disk does not take them, or the file was taken away; the log is as it was.
        """
        with self._turn:
            self._require_there()
            new: dict[str, FeedbackEvent] = {}
            for event in events:
                known = self._known.get(event.id) or new.setdefault(event.id, event)
                if known != event:
                    raise ConflictError(
                        "id: got one that an earlier event of other contents has, expected a new one for each choice; "
                        "correct it"
                    )
            if new:
                self._write(list(new.values()))
                self._known.update(new)
            return len(new)

    def _write(self, events: Sequence[FeedbackEvent]) -> None:
        first = len(self._known)
        lines = (
            json.dumps({"sequence": first + i, **asdict(event)}, ensure_ascii=False) for i, event in enumerate(events)
        )
        data = "".join(f"{line}\n" for line in lines).encode()
        with _held(self._readers, fcntl.LOCK_EX):
            try:
                written = 0
                while written < len(data):
                    written += os.pwrite(self._file, data[written:], self._end + written)
                os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, self._end)
                raise
        self._end += len(data)

    def _require_there(self) -> None:
        """What is written to a file that was removed or replaced is gone with this process."""
        mine = os.fstat(self._file)
        there = os.stat(self.path)
        if (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(self.path))

    def close(self) -> None:
        """Let another process write."""
        os.close(self._readers)
        os.close(self._file)


class FeedbackReader:
    """Reads a log while it grows. Several may; whoever counts what it has taken uses `FeedbackConsumer`."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._next, self._offset = 0, 0

    def events(self, start: int = 0) -> Iterator[Logged]:
        """What is committed by now, from place `start` on.

        Raises:
            ValueError: a line that is no event, or not the one that belongs there.
        """
        if start < self._next:
            self._next, self._offset = 0, 0
        for line in self._whole_lines():
            logged = self._parse(line)
            self._next, self._offset = self._next + 1, self._offset + len(line)
            if logged.sequence >= start:
                yield logged

    def _whole_lines(self) -> Iterator[bytes]:
        """From where reading stopped; none of a log that nobody has written to yet."""
        if not self.path.exists():
            if self._next:
                raise ValueError(
                    f"{self.path}: got no file where {self._next} events were read, expected a log that only grows; "
                    "put it back"
                )
            return
        with contextlib.ExitStack() as stack:
            # A log that was copied from elsewhere may lack the lock, and has no writer then.
            with contextlib.suppress(FileNotFoundError):
                lock = os.open(_writing(self.path), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                stack.callback(os.close, lock)
                stack.enter_context(_held(lock, fcntl.LOCK_SH))
            file = stack.enter_context(open(self.path, "rb"))
            file.seek(self._offset)
            committed = file.read()
        yield from takewhile(lambda line: line.endswith(b"\n"), io.BytesIO(committed))

    def _parse(self, line: bytes) -> Logged:
        where = f"{self.path}:{self._next + 1}"
        try:
            values = json.loads(line)
            sequence = values.pop("sequence")
            event = event_of(values)
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{where}: got no event ({error}), expected the lines that were written; restore the file"
            ) from error
        if sequence != self._next:
            raise ValueError(f"{where}: got event {sequence}, expected {self._next}; restore the file")
        return Logged(sequence, event)


class FeedbackConsumer:
    """The one learner that takes events from a log."""

    def __init__(self, path: Path, *, batch_size: int, poll_seconds: float = 0.5) -> None:
        """
        Args:
            batch_size: events of one step.
            poll_seconds: how often to look for new ones while there are too few.

        Raises:
            ValueError: another process takes events from this log: they would be counted twice.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, expected at least 1; raise it")
        self.path, self.batch_size, self.poll_seconds = Path(path), batch_size, poll_seconds
        self._lock = _locked(self.path.with_name(self.path.name + ".consumer"), "takes from")
        self._reader = FeedbackReader(self.path)
        self._stopped = threading.Event()
        self._held: list[Logged] | None = None
        self._place = 0

    def seek(self, start: int, *, after: str | None) -> None:
        """Go to where the first `take` will begin, to refuse what it would. Arguments and errors as there."""
        if self._held is None:
            self._held = self._begin(start, after)

    def take(self, start: int, *, after: str | None) -> list[Logged]:
        """The `batch_size` events from place `start` on; waits for them. Empty once `stop` was called and fewer are
        there: those wait for the next start.

        Args:
            after: id of the event before place `start`, as the taker remembers it; None for a first start.

        Raises:
            ValueError: another event stands before `start`: this is not the log that was taken from.
        """
        self.seek(start, after=after)
        assert self._held is not None
        assert start == self._place, "events are taken in order"
        while True:
            stopped = self._stopped.is_set()
            self._look()
            if len(self._held) >= self.batch_size:
                # What is learnt from must not be lost with the machine when its weights are not.
                fsync_path(self.path)
                taken, self._held = self._held[: self.batch_size], self._held[self.batch_size :]
                self._place += len(taken)
                return taken
            if stopped:
                return []
            self._stopped.wait(self.poll_seconds)

    def _begin(self, start: int, after: str | None) -> list[Logged]:
        self._place = start
        if not start:
            return []
        logged = list(self._reader.events())
        if len(logged) < start:
            raise ValueError(
                f"{self.path}: got {len(logged)} events, expected at least {start}, which were taken; put that log "
                "back"
            )
        if logged[start - 1].event.id != after:
            raise ValueError(
                f"{self.path}: got another event at place {start - 1} than the one that was learnt from, expected the "
                "same log; put it back, or start a new run"
            )
        return logged[start:]

    def _look(self) -> None:
        assert self._held is not None
        self._held += self._reader.events(self._place + len(self._held))

    def stop(self) -> None:
        """Wait no longer: what is there makes full batches or is left. From any thread, or a signal."""
        self._stopped.set()

    def close(self) -> None:
        """Let another process take."""
        os.close(self._lock)


def _opened(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ValueError(
            f"feedback log: got {path} ({error.strerror}), expected a file in a folder that can be written; correct it"
        ) from error


def _writing(path: Path) -> Path:
    """Locked by the writer while it writes, and by readers while they read. It is empty."""
    return path.with_name(path.name + ".writing")


@contextlib.contextmanager
def _held(descriptor: int, kind: int) -> Iterator[None]:
    """Waits for the lock; a process that ends lets go of it."""
    fcntl.flock(descriptor, kind)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _locked(path: Path, does: str) -> int:
    descriptor = _opened(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(
            f"{path}: got a feedback log that another process {does}, expected one at a time; stop that one"
        ) from None
    return descriptor


def _end_of_lines(descriptor: int) -> int:
    """Bytes up to and including the last line end."""
    end = os.fstat(descriptor).st_size
    while end:
        begin = max(0, end - (1 << 16))
        found = os.pread(descriptor, end - begin, begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0


def _texts(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or len(value) > MOST_SHOWN:
        got = f"{len(value)} items" if isinstance(value, list | tuple) else type(value).__name__
        raise ValueError(f"{name}: got {got}, expected a list of at most {MOST_SHOWN} items; correct it")
    return tuple(_text(item, name) for item in value)


def _text(value: Any, name: str) -> str:
    """A name, or a number that serves as one."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip() or len(value) > LONGEST_TEXT:
        got = f"{len(value)} characters" if isinstance(value, str) else type(value).__name__
        raise ValueError(f"{name}: got {got}, expected text of 1 to {LONGEST_TEXT} characters; correct it")
    if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{name}: got a NUL or half a surrogate pair, expected whole characters; correct it")
    return value

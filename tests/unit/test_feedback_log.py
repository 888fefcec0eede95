"""The feedback log: no event lost or twice, whatever is killed, torn or sent again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import pytest

from alignment.feedback_log import (
    ConflictError,
    FeedbackConsumer,
    FeedbackEvent,
    FeedbackLog,
    FeedbackReader,
    event_of,
)

ROOT = Path(__file__).resolve().parents[2]


def event(number: int, **changes) -> FeedbackEvent:
    values = {"id": f"e{number}", "user": 7, "shown": ["A", "B", f"C {number}"], "chosen": "B"}
    return event_of({**values, **changes})


def logged(path: Path) -> list[str]:
    entries = list(FeedbackReader(path).events())
    assert [entry.sequence for entry in entries] == list(range(len(entries)))
    return [entry.event.id for entry in entries]


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "feedback.jsonl"


def test_events_come_back_as_they_were(path):
    log = FeedbackLog(path)
    events = [event(0), event(1, liked=["Señor «X»\n"], shown=[12, 13], chosen=13, user="ann")]
    assert log.append(events) == 2
    assert [entry.event for entry in FeedbackReader(path).events()] == events
    assert events[1].chosen == "13"
    assert path.stat().st_mode & 0o777 == 0o600
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["sequence"] for line in lines] == [0, 1]


def test_an_event_that_is_sent_again_counts_once(path):
    log = FeedbackLog(path)
    assert log.append([event(0), event(0), event(1)]) == 2
    assert log.append([event(1), event(2)]) == 1
    log.close()
    again = FeedbackLog(path)
    assert again.append([event(2), event(0)]) == 0
    assert len(again) == 3
    with pytest.raises(ConflictError, match="id: got one that an earlier event"):
        again.append([event(3), event(1, chosen="A")])
    with pytest.raises(ConflictError):
        again.append([event(4), event(4, chosen="A")])
    assert logged(path) == ["e0", "e1", "e2"]


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_line_is_no_event_and_makes_room(path, cut):
    log = FeedbackLog(path)
    log.append([event(0), event(1)])
    log.close()
    os.truncate(path, path.stat().st_size - cut)
    assert logged(path) == ["e0"]
    log = FeedbackLog(path)
    assert log.append([event(1), event(2)]) == 2
    assert logged(path) == ["e0", "e1", "e2"]


@pytest.mark.parametrize("damage", [b'{"sequence": 1}\n', b"\0\0\0\n", b'{"sequence": 5, "id": "x"}\n', b"[]\n"])
def test_a_damaged_log_is_refused(path, damage):
    log = FeedbackLog(path)
    log.append([event(0)])
    log.close()
    with path.open("ab") as file:
        file.write(damage)
    with pytest.raises(ValueError, match=f"{path}:2: got"):
        logged(path)
    opened = len(os.listdir("/proc/self/fd"))
    for _ in range(2):  # what refuses holds no lock afterwards
        with pytest.raises(ValueError, match="restore the file"):
            FeedbackLog(path)
    assert len(os.listdir("/proc/self/fd")) == opened


def test_one_that_is_missing_in_between_is_noticed(path):
    log = FeedbackLog(path)
    log.append([event(i) for i in range(3)])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[2])
    with pytest.raises(ValueError, match="got event 2, expected 1"):
        logged(path)


def test_a_full_disk_leaves_the_log_as_it_was(path):
    """In a process of its own, with a limit on what files may hold."""
    code = """
import resource, signal, sys
from alignment.feedback_log import FeedbackLog, event_of
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def event(i): return event_of({"id": f"e{i}", "user": 7, "shown": ["A", "B"], "chosen": "B"})
log = FeedbackLog(sys.argv[1])
log.append([event(0)])
resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))
try:
    log.append([event(i) for i in range(1, 9)])
except OSError as error:
    print(error.errno, len(log))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(log.append([event(1)]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.split() == ["27", "1", "1"]
    assert logged(path) == ["e0", "e1"]


@pytest.mark.parametrize("by", ["nothing", "another file"])
def test_a_log_that_was_taken_away_takes_nothing(path, by):
    """What is written to a file without a name would be gone with the process, and who asks would believe it there."""
    log, reader = FeedbackLog(path), FeedbackReader(path)
    log.append([event(0)])
    assert len(list(reader.events())) == 1
    kept = path.rename(path.with_name("kept"))
    if by == "another file":
        path.write_bytes(kept.read_bytes())
    for number in (0, 1):  # one that is known, and a new one
        with pytest.raises(OSError, match=r"No such file|Stale file"):
            log.append([event(number)])
    if by == "nothing":
        with pytest.raises(ValueError, match="got no file where 1 events were read"):
            list(reader.events(1))
    kept.replace(path)
    assert log.append([event(1)]) == 1
    assert logged(path) == ["e0", "e1"]


WRITER = """
import sys
from alignment.feedback_log import FeedbackLog, event_of
log = FeedbackLog(sys.argv[1])
for i in range(100_000):
    log.append([event_of({"id": f"e{i}", "user": 7, "shown": ["A", "B", "C" * 400], "chosen": "B"})])
    print(i, flush=True)
"""


def test_a_writer_that_is_killed_loses_nothing_that_it_accepted(path):
    """SIGKILL while it writes without pause: what it told of is there, and the next one goes on behind it."""
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert writer.stdout is not None
    for line in writer.stdout:
        if int(line) == 40:
            break
    writer.send_signal(signal.SIGKILL)
    told = [int(line) for line in writer.stdout if line.endswith("\n")] or [40]
    assert writer.wait(30) == -signal.SIGKILL
    log = FeedbackLog(path)  # the lock went with the process
    ids = logged(path)
    assert ids == [f"e{i}" for i in range(len(ids))]
    assert len(ids) in (told[-1] + 1, told[-1] + 2)
    assert log.append([event(0, shown=["A", "B", "C" * 400]), event(len(ids))]) == 1
    assert logged(path) == [*ids, f"e{len(ids)}"]


def test_what_is_known_or_learnt_is_on_the_disk(path, monkeypatch):
    """A kill may come between writing a line and fsync: whoever reads it next sees to it that it stays."""
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_ino), fsync(file))[1])
    path.write_text(json.dumps({"sequence": 0, **asdict(event(0))}) + "\n")
    log = FeedbackLog(path)
    assert path.stat().st_ino in synced
    synced.clear()
    assert log.append([event(0)]) == 0
    assert FeedbackConsumer(path, batch_size=1).take(0, after=None)[0].event == event(0)
    assert path.stat().st_ino in synced


def test_one_writes_and_one_takes(path):
    log, consumer = FeedbackLog(path), FeedbackConsumer(path, batch_size=2)
    with pytest.raises(ValueError, match="that another process writes"):
        FeedbackLog(path)
    with pytest.raises(ValueError, match="that another process takes from"):
        FeedbackConsumer(path, batch_size=2)
    code = f"from alignment.feedback_log import FeedbackConsumer; FeedbackConsumer({str(path)!r}, batch_size=2)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert "another process takes from" in other.stderr
    consumer.close()
    log.close()
    FeedbackConsumer(path, batch_size=2).close()
    FeedbackLog(path).close()


def ids(taken) -> list[str]:
    return [entry.event.id for entry in taken]


def test_events_are_taken_in_order_and_in_full_batches(path):
    log, consumer = FeedbackLog(path), FeedbackConsumer(path, batch_size=2, poll_seconds=0)
    log.append([event(i) for i in range(5)])
    consumer.stop()
    assert ids(consumer.take(0, after=None)) == ["e0", "e1"]
    assert ids(consumer.take(2, after="e1")) == ["e2", "e3"]
    assert consumer.take(4, after="e3") == []
    consumer.close()
    later = FeedbackConsumer(path, batch_size=2)
    log.append([event(5)])
    assert ids(later.take(4, after="e3")) == ["e4", "e5"]


def test_waiting_ends_when_the_last_one_comes(path):
    """The taker waits while the writer writes; each batch is there as soon as it is whole."""
    log, consumer = FeedbackLog(path), FeedbackConsumer(path, batch_size=3, poll_seconds=0.001)
    taken: list[str] = []

    def take() -> None:
        while batch := consumer.take(len(taken), after=taken[-1] if taken else None):
            taken.extend(ids(batch))

    taker = threading.Thread(target=take)
    taker.start()
    for i in range(31):
        log.append([event(i)])
    consumer.stop()
    taker.join(30)
    assert taken == [f"e{i}" for i in range(30)]


def test_another_log_than_the_one_taken_from_is_noticed(path):
    FeedbackLog(path).append([event(i) for i in range(4)])
    with pytest.raises(ValueError, match="got another event at place 1"):
        FeedbackConsumer(path, batch_size=1).take(2, after="e7")


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5])
def test_a_log_that_lost_what_was_taken_is_refused(path, length):
    """Four events were taken, whatever is left of the log."""
    log, consumer = FeedbackLog(path), FeedbackConsumer(path, batch_size=1)
    log.append([event(i) for i in range(length)])
    if length < 4:
        with pytest.raises(ValueError, match=f"got {length} events, expected at least 4, which were taken; put that"):
            consumer.take(4, after="e3")
    else:
        consumer.stop()
        assert ids(consumer.take(4, after="e3")) == [f"e{i}" for i in range(4, length)]


REFUSING = """
import errno, os, sys
from alignment import feedback_log
log = feedback_log.FeedbackLog(sys.argv[1])
def event(i): return feedback_log.event_of({"id": f"e{i}", "user": 7, "shown": ["A", "B"], "chosen": "B"})
log.append([event(0)])
def refuse(descriptor):
    print("on its way", flush=True)
    sys.stdin.readline()
    raise OSError(errno.EIO, "no")
feedback_log.os.fsync = refuse
try:
    log.append([event(1), event(2)])
except OSError as error:
    print(error.errno, flush=True)
"""


def test_what_a_disk_refuses_was_never_there_to_be_read(path):
    """A reader comes while another process waits for a disk that will take nothing."""
    writer = subprocess.Popen(
        [sys.executable, "-c", REFUSING, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "on its way\n"
    assert path.read_bytes().count(b"\n") == 3
    seen: list[str] = []
    reader = threading.Thread(target=lambda: seen.extend(logged(path)))
    reader.start()
    reader.join(0.5)
    assert writer.communicate("\n", timeout=30)[0] == "5\n"
    reader.join(30)
    assert seen == ["e0"]
    path.with_name("feedback.jsonl.writing").unlink()
    assert logged(path) == ["e0"]  # a log that was copied without its lock


def test_a_place_for_no_log_is_refused(path, tmp_path):
    with pytest.raises(ValueError, match=r"got .*none/log \(No such file or directory\)"):
        FeedbackLog(tmp_path / "none" / "log")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="symbolic links"):
        FeedbackLog(path)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"chosen": "Z"}, "chosen: got an item that is not in shown"),
        ({"shown": ["B"]}, "shown: got 1 items, expected at least 2"),
        ({"shown": ["B", "B"]}, "each once"),
        ({"shown": "B"}, "shown: got str"),
        ({"shown": [str(i) for i in range(101)], "chosen": "0"}, "shown: got 101 items"),
        ({"id": ""}, "id: got 0 characters"),
        ({"id": "x" * 501}, "id: got 501 characters"),
        ({"user": None}, "user: got NoneType"),
        ({"user": True}, "user: got bool"),
        ({"user": "\ud800"}, "half a surrogate pair"),
        ({"liked": [1.5]}, "liked: got float"),
        ({"label": 1}, "got 'label'"),
    ],
)
def test_what_is_no_choice_is_refused(changes, fault):
    with pytest.raises(ValueError, match=fault):
        event(0, **changes)

"""A file that an application appends feedback to: each whole line once into the log, and what is no event told of."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from alignment.feedback_file import FeedbackFile
from alignment.feedback_log import FeedbackEvent, FeedbackLog, FeedbackReader


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "feedback.jsonl"


def logged(path: Path) -> list[str]:
    return [entry.event.id for entry in FeedbackReader(path).events()]


def line(number: int, **changes) -> str:
    values = {"id": f"e{number}", "user": 7, "shown": ["A", "B", f"C {number}"], "chosen": "B", **changes}
    return json.dumps(values) + "\n"


def no_z(chosen: FeedbackEvent) -> None:
    if "Z" in chosen.shown:
        raise ValueError("shown: got an item that is not known, expected one of the catalogue; correct it")


def test_a_file_that_grows(path, tmp_path):
    log, source = FeedbackLog(path), tmp_path / "clicks.jsonl"
    clicks = FeedbackFile(source, log, check=no_z)
    assert clicks.take().new == 0
    half = line(1)
    source.write_text(line(0) + half[:20])
    assert (clicks.take().new, logged(path)) == (1, ["e0"])
    with source.open("a") as file:
        file.write(half[20:] + "\n" + "{broken\n" + line(2, shown=["B", "Z"]) + line(0, chosen="A") + line(3))
    taken = clicks.take()
    assert (taken.new, taken.known) == (2, 0)
    assert [reason.split(":", 2)[1:] for reason in taken.refused[:2]] == [
        ["4", " got no JSON (JSONDecodeError), expected an event; correct the line"],
        ["5", " shown: got an item that is not known, expected one of the catalogue; correct it"],
    ]
    assert taken.refused[2].startswith(f"{source}:6: id: got one that an earlier event of other contents has")
    assert logged(path) == ["e0", "e1", "e3"]
    # After a restart the file is read anew, and nothing counts again.
    checked: list[str] = []

    def note(event: FeedbackEvent) -> None:
        checked.append(event.id)
        no_z(event)

    again = FeedbackFile(source, log, check=note).take()
    assert (again.new, again.known, len(again.refused)) == (0, 3, 3)
    assert checked == ["e2", "e0"], "with contents that are not known; a check may take long"
    source.write_text(line(4))
    with pytest.raises(ValueError, match=r"got \d+ bytes where \d+ bytes were read, expected a file that only grows"):
        clicks.take()


@pytest.mark.parametrize(
    ("change", "got"),
    [("replaced", "another file"), ("removed", "no file"), ("rewritten", "other lines")],
)
def test_a_file_that_another_one_took_the_place_of_is_refused(path, tmp_path, change, got):
    """Each of them is as long as what was read, or longer: lines of the first one may have been missed."""
    source = tmp_path / "clicks.jsonl"
    clicks = FeedbackFile(source, FeedbackLog(path), check=no_z)
    source.write_text("")
    assert clicks.take().new == 0
    (tmp_path / "new").write_text(line(0) + line(1))
    (tmp_path / "new").replace(source)  # nothing was read of the first one
    assert clicks.take().new == 2
    (tmp_path / "new").write_text(line(0) + line(1) + line(2))
    if change == "replaced":
        (tmp_path / "new").replace(source)
    elif change == "removed":
        source.unlink()
    else:
        source.write_text(line(3) + line(4) + line(5))
    with pytest.raises(
        ValueError, match=f"clicks.jsonl: got {got} where .* were read, expected a file that only grows"
    ):
        clicks.take()


def test_what_is_no_regular_file_is_refused(path, tmp_path):
    """A pipe cannot be read again after a kill, and opening one would wait for a writer."""
    os.mkfifo(tmp_path / "pipe")
    for source in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(ValueError, match=f"{source}: got no regular file, expected one that grows"):
            FeedbackFile(source, FeedbackLog(path.with_name(source.name + ".log")), check=no_z).take()


def test_a_file_is_followed_to_its_end(path, tmp_path):
    log, source, stop, told = FeedbackLog(path), tmp_path / "clicks.jsonl", threading.Event(), []
    follower = threading.Thread(
        target=FeedbackFile(source, log, check=no_z).follow, args=(stop, told.append), kwargs={"seconds": 0.001}
    )
    follower.start()
    with source.open("a") as file:
        for i in range(50):
            file.write(line(i) if i != 25 else "nonsense\n")
            file.flush()
    stop.set()
    follower.join(30)
    assert logged(path) == [f"e{i}" for i in range(50) if i != 25]
    assert len(told) == 1

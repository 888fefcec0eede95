"""Records in a file that only grows: whole ones come back, and from the first damaged one on nothing does."""

from __future__ import annotations

import hashlib
import json

import pytest

from alignment import verified_lines
from alignment.verified_lines import VerifiedLines

RECORDS = [{"text": "one"}, {"text": "zwei ü\n"}, {"text": "three", "more": [1, None]}]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "records.txt"
    lines = VerifiedLines(path, "batch")
    assert lines.read() == []
    for number, record in enumerate(RECORDS):
        lines.append(number, record)
    return path


def numbered(records):
    return [{"batch": number, **record} for number, record in enumerate(records)]


def test_records_come_back_in_order(path):
    assert VerifiedLines(path, "batch").read() == numbered(RECORDS)
    for line in path.read_bytes().splitlines():
        digest, _, text = line.partition(b" ")
        assert digest.decode() == hashlib.sha256(text).hexdigest()
        assert json.loads(text)["batch"] in range(3)


@pytest.mark.parametrize("most", [0, 1, 3, 9])
def test_what_is_beyond_the_most_is_cut_off(path, most):
    lines = VerifiedLines(path, "batch")
    assert lines.read(most) == numbered(RECORDS)[:most]
    assert lines.read() == numbered(RECORDS)[:most]


@pytest.mark.parametrize("damaged", [0, 1, 2])
def test_a_damaged_line_and_those_behind_it_were_never_written(path, damaged):
    lines = path.read_bytes().splitlines(keepends=True)
    lines[damaged] = lines[damaged].replace(b"text", b"test")
    path.write_bytes(b"".join(lines))
    again = VerifiedLines(path, "batch")
    assert again.read() == numbered(RECORDS)[:damaged]
    again.append(damaged, {"text": "anew"})
    assert VerifiedLines(path, "batch").read() == numbered([*RECORDS[:damaged], {"text": "anew"}])


@pytest.mark.parametrize("cut", [1, 10, 80])
def test_a_line_that_a_kill_cut_short_makes_room(path, cut):
    path.write_bytes(path.read_bytes()[:-cut])
    again = VerifiedLines(path, "batch")
    assert again.read() == numbered(RECORDS)[:2]
    again.append(2, RECORDS[2])
    assert again.read() == numbered(RECORDS)


def test_a_line_at_another_place_is_none_of_them(path):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[2])
    assert VerifiedLines(path, "batch").read() == numbered(RECORDS)[:1]


def test_the_file_and_its_name_are_on_the_disk(tmp_path, monkeypatch):
    """A new file's name lies in its folder, which is pushed to the disk once, after the first record."""
    kept, own = [], verified_lines.fsync_path

    def fsync_path(path):
        kept.append(path)
        own(path)

    monkeypatch.setattr(verified_lines, "fsync_path", fsync_path)
    lines = VerifiedLines(tmp_path / "records.txt", "batch")
    for number in range(3):
        lines.append(number, {})
    file = tmp_path / "records.txt"
    assert kept == [file, tmp_path, file, file]

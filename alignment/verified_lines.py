"""Numbered records in a file that only grows: each is on disk before the next, and says whether it is whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignment.run_directory import append_lines, fsync_path


class VerifiedLines:
    """A line for each record, which begins with the sha256 of the rest of it, a JSON object.

    A line that a kill cut short, or that something damaged, and what follows it, are as if never written.
    """

    def __init__(self, path: Path, key: str) -> None:
        """`key`: what a record calls its number, from 0."""
        self.path, self.key = path, key
        self._name_is_kept = False

    def read(self, most: int | None = None) -> list[dict[str, Any]]:
        """The records up to the first line that is not whole, or `most` of them; from there on the file is cut."""
        records: list[dict[str, Any]] = []
        if not self.path.exists():
            return records
        end = 0
        with open(self.path, "rb") as file:
            for line in file:
                record = self._record(line, len(records)) if most is None or len(records) < most else None
                if record is None:
                    break
                records.append(record)
                end += len(line)
        if end < self.path.stat().st_size:
            os.truncate(self.path, end)
        return records

    def append(self, number: int, record: Mapping[str, Any]) -> None:
        """Record `number`, on disk when this returns."""
        text = json.dumps({self.key: number, **record}, ensure_ascii=False)
        append_lines(self.path, [f"{_digest(text.encode())} {text}"])
        fsync_path(self.path)
        if not self._name_is_kept:
            fsync_path(self.path.parent)  # who created the file may have been killed before this
            self._name_is_kept = True

    def _record(self, line: bytes, number: int) -> dict[str, Any] | None:
        """None for a line that is not record `number` as it was written."""
        digest, _, text = line.removesuffix(b"\n").partition(b" ")
        if not line.endswith(b"\n") or digest != _digest(text).encode():
            return None
        record: dict[str, Any] = json.loads(text)
        return record if record[self.key] == number else None


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()

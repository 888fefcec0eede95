"""Numbers of a reference that stays: computed once, kept on disk by what they were made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from alignment.run_directory import write_text_atomic


class Asked(Protocol):
    """What a reference can be asked about."""

    @property
    def prompt_ids(self) -> tuple[int, ...]: ...
    @property
    def sequences(self) -> tuple[tuple[int, ...], ...]: ...


AskedT = TypeVar("AskedT", bound=Asked)
Compute = Callable[[list[AskedT]], Sequence[Any]]
"""From records to a number, or a row of numbers, of each."""


class CachedNumbers:
    """What the reference says of each record. Records of the same tokens share one entry."""

    def __init__(self, numbers: Mapping[str, Any]) -> None:
        self._numbers = numbers

    def __call__(self, records: Sequence[Asked]) -> list[Any]:
        """In the order given.

        Raises:
            KeyError: a record that was not among those the cache was filled for.
        """
        return [self._numbers[record_key(record)] for record in records]


def record_key(record: Asked) -> str:
    """Of its tokens alone, and of where the prompt ends."""
    return hashlib.sha256(repr((len(record.prompt_ids), record.sequences)).encode()).hexdigest()


def cached_numbers(
    folder: Path, made_of: Mapping[str, str], records: Iterable[AskedT], compute: Compute[AskedT]
) -> tuple[CachedNumbers, str]:
    """The numbers of all records: those on disk, or new ones, which are then written.

    Args:
        folder: of the cache; a file in it is named by a hash of `made_of` and of the records.
        made_of: whatever changes the numbers: the model, its dtype, the settings of the sums.
        compute: asks the reference; once, about each different record.

    Returns:
        The numbers, and a line that tells where they come from.
    """
    asked = {record_key(record): record for record in records}
    origin = dict(sorted(made_of.items()))
    name = _sha256([origin, list(asked)])
    path = folder / f"{name}.json"
    rows, reason = _read(path, name, len(asked))
    if rows is not None:
        return CachedNumbers(dict(zip(asked, rows, strict=True))), f"reference: {len(asked)} records out of {path}"
    folder.mkdir(parents=True, exist_ok=True)  # before the work: a folder that cannot be had costs nothing then
    rows = [list(row) if isinstance(row, Sequence) else row for row in compute(list(asked.values()))]
    saved = {"name": name, "made_of": origin, "sha256": _sha256(rows), "numbers": rows}
    write_text_atomic(path, json.dumps(saved))
    told = f"reference: {len(asked)} records computed and written to {path}"
    return CachedNumbers(dict(zip(asked, rows, strict=True))), told + (f" ({reason})" if reason else "")


def _read(path: Path, name: str, count: int) -> tuple[list[Any] | None, str]:
    """The rows of a sound file, or why there are none."""
    if not path.exists():
        return None, ""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        sound = saved["name"] == name and saved["sha256"] == _sha256(saved["numbers"])
        rows: list[Any] = saved["numbers"]
    except (ValueError, KeyError, TypeError):
        sound, rows = False, []
    if not sound or len(rows) != count:
        return None, "the file there was damaged"
    return rows, ""


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()

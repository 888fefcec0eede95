"""Rows by their place, read when they are asked for: the data stays on the disk.

What is kept in memory is where each row begins: 8 bytes a row of a .jsonl file, nothing a row elsewhere.
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import IO, Any, Generic, Protocol, TypeVar

from alignment.config import SourceConfig
from alignment.data.files import MAX_LINE_BYTES, Row, check_text, jsonl_row
from alignment.data.sources import expand, load_hub, read_rows

T_co = TypeVar("T_co", covariant=True)
ROW_GROUPS_HELD = 4
"""Decoded groups of a parquet file that stay in memory."""


class ByPlace(Protocol[T_co]):
    """What can be gone through, and after that be reached by its place, from 0. A list is one."""

    def __iter__(self) -> Iterator[T_co]: ...

    def __getitem__(self, index: int, /) -> T_co: ...

    def __len__(self) -> int: ...


Rows = ByPlace[Row]


def open_rows(source: SourceConfig) -> Rows:
    """The rows of a source, left where they are. Assets are small and come into memory.

    Raises:
        ValueError: nothing there, or a file whose rows cannot be reached singly. Broken rows are refused when read.
    """
    if source.asset is not None:
        return read_rows(source)
    if source.hub is not None:
        return _limited(_HubRows(source.hub, source.hub_split), source.limit)
    assert source.path is not None
    return _limited(Joined([_open_file(file) for file in expand(source.path)]), source.limit)


def _open_file(path: Path) -> Rows:
    if path.suffix == ".jsonl":
        return JsonlRows(path)
    if path.suffix == ".parquet":
        return ParquetRows(path)
    raise ValueError(
        f"{path}: got {path.suffix!r} with data.streaming, expected .jsonl or .parquet, whose rows can be read "
        "singly; convert it, or set data.streaming to false"
    )


class JsonlRows:
    """Rows of a .jsonl file by the byte at which they begin, known after one iteration."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._starts = array("Q")
        self._blanks = array("Q")  # for each blank line, how many rows stand before it
        self._version = _version(path)

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Row]:
        self._starts, self._blanks, self._version = array("Q"), array("Q"), _version(self.path)
        with _opened(self.path) as file:
            number = start = 0
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                row = jsonl_row(raw, self.path, number)
                if row is None:
                    self._blanks.append(len(self._starts))
                else:
                    check_text(row)
                    self._starts.append(start)
                    yield row
                start += len(raw)

    def __getitem__(self, index: int, /) -> Row:
        number = index + 1 + bisect_right(self._blanks, index)
        with _opened(self.path) as file:
            if _version(file.fileno()) != self._version:
                raise ValueError(
                    f"{self.path}:{number}: got a file that has changed since the run began, expected the same bytes; "
                    "start again with data that nobody writes to"
                )
            file.seek(self._starts[index])
            row = jsonl_row(file.readline(MAX_LINE_BYTES + 1), self.path, number)
        assert row is not None
        check_text(row)
        return row


def _opened(path: Path) -> IO[bytes]:
    try:
        return open(path, "rb")
    except OSError as error:
        raise ValueError(
            f"{path}: got a file that cannot be read ({error.strerror}), expected a readable one; correct the path or "
            "its permissions"
        ) from error


def _version(file: Path | int) -> tuple[int, int]:
    try:
        state = os.stat(file)
    except OSError as error:
        raise ValueError(
            f"{file}: got a file that cannot be read ({error.strerror}), expected a readable one; correct the path or "
            "its permissions"
        ) from error
    return state.st_size, state.st_mtime_ns


class ParquetRows:
    """Rows of a .parquet file; a whole row group is decoded for one of its rows, and the last few are kept."""

    def __init__(self, path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        self.path = path
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{path}: got broken parquet ({reason}), expected a whole file; write it again"
            ) from error
        self._starts = [0, *accumulate(sizes)]
        self._held: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return self._starts[-1]

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int, /) -> Row:
        group = bisect_right(self._starts, index) - 1
        (values,) = self._group(group).slice(index - self._starts[group], 1).to_pylist()
        row = Row(values, f"{self.path}:row {index + 1}")
        check_text(row)
        return row

    def _group(self, number: int) -> Any:
        import pyarrow
        import pyarrow.parquet

        if number not in self._held:
            try:
                with pyarrow.parquet.ParquetFile(self.path) as file:
                    self._held[number] = file.read_row_group(number)
            except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, OSError) as error:
                raise ValueError(
                    f"{self.path}:row {self._starts[number] + 1}: got broken parquet ({str(error).splitlines()[0]}), "
                    "expected a whole file; write it again"
                ) from error
            while len(self._held) > ROW_GROUPS_HELD:
                self._held.popitem(last=False)
        self._held.move_to_end(number)
        return self._held[number]


class _HubRows:
    def __init__(self, name: str, split: str) -> None:
        self._table = load_hub(name, split)
        self._name = f"{name}[{split}]"

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[Row]:
        return (self._row(index, values) for index, values in enumerate(self._table))

    def __getitem__(self, index: int, /) -> Row:
        return self._row(index, self._table[index])

    def _row(self, index: int, values: dict[str, Any]) -> Row:
        return Row(dict(values), f"{self._name}:row {index + 1}")


class Joined(Generic[T_co]):
    """One behind the other: the rows of files, or the examples of sources."""

    def __init__(self, parts: Sequence[ByPlace[T_co]]) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __iter__(self) -> Iterator[T_co]:
        for part in self._parts:
            yield from part

    def __getitem__(self, index: int, /) -> T_co:
        for part in self._parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)


class _Head:
    """The first rows."""

    def __init__(self, rows: Rows, limit: int) -> None:
        self._rows, self._limit = rows, limit

    def __len__(self) -> int:
        return min(self._limit, len(self._rows))

    def __iter__(self) -> Iterator[Row]:
        return islice(self._rows, self._limit)

    def __getitem__(self, index: int, /) -> Row:
        return self._rows[index]


def _limited(rows: Rows, limit: int | None) -> Rows:
    return rows if limit is None else _Head(rows, limit)

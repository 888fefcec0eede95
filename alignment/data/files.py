"""Rows out of local files: .jsonl .json .csv .parquet, each also .gz. A broken row is refused by file and line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

MAX_LINE_BYTES = 10_000_000
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True, slots=True)
class Row:
    """One row and where it stands."""

    values: dict[str, Any]
    where: str
    """`file:line` (`file:row` where a file has no lines)."""


def read_file(path: Path) -> Iterator[Row]:
    """The rows of one file, in order.

    A byte-order mark, CRLF and blank lines are fine.

    Raises:
        ValueError: `file:line: reason` for broken JSON or CSV, NUL, invalid UTF-8, a lone surrogate, a row that is
            no object, a line over 10 MB; a cut-off .gz; a format not known; a file that cannot be opened.
    """
    suffix = Path(path.name.removesuffix(".gz")).suffix
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    if suffix not in readers:
        raise ValueError(f"{path}: got suffix {path.suffix!r}, expected one of {SUFFIXES}, each also .gz; convert it")
    try:
        with _open(path) as file:
            for row in readers[suffix](path, file):
                check_text(row)
                yield row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        _refuse(str(path), f"got a .gz that is cut off or damaged ({error}), expected a whole one", "fetch it again")
    except OSError as error:
        _refuse(
            str(path),
            f"got a file that cannot be read ({error.strerror or error}), expected a readable one",
            "correct the path or its permissions",
        )


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]


def _refuse(where: str, got: str, remedy: str) -> NoReturn:
    raise ValueError(f"{where}: {got}; {remedy}")


def _lines(path: Path, file: IO[bytes]) -> Iterator[tuple[str, str]]:
    """`(where, text)` of each line, decoded, without its line end; blank ones included."""
    number = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        yield f"{path}:{number}", _line(raw, path, number)


def _line(raw: bytes, path: Path, number: int) -> str:
    if len(raw) > MAX_LINE_BYTES:
        got = f"got a line over {MAX_LINE_BYTES:,} bytes, expected one row a line"
        _refuse(f"{path}:{number}", got, "split the row")
    return _decode(raw, path, number)


def _decode(raw: bytes, path: Path, number: int) -> str:
    where = f"{path}:{number}"
    if b"\0" in raw:
        _refuse(where, "got a NUL byte, expected text", "remove it, or save the file as UTF-8")
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        _refuse(
            where, f"got bytes at column {error.start + 1} that are no UTF-8, expected UTF-8", "save the file as UTF-8"
        )


def _jsonl(path: Path, file: IO[bytes]) -> Iterator[Row]:
    number = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if row := jsonl_row(raw, path, number):
            yield row


def jsonl_row(raw: bytes, path: Path, number: int) -> Row | None:
    """The row of one line of a .jsonl file, `number` from 1; None for a blank line.

    Raises:
        ValueError: as `read_file`, but for text that a tokenizer cannot take: see `check_text`.
    """
    where = f"{path}:{number}"
    text = _line(raw, path, number)
    return Row(_object(_parse(text, where), where), where) if text.strip() else None


def _json(path: Path, file: IO[bytes]) -> Iterator[Row]:
    # All rows may stand in one line, of any length.
    lines = [_decode(raw, path, number) for number, raw in enumerate(file, start=1)]
    if not any(line.strip() for line in lines):
        return
    rows = _parse("\n".join(lines), str(path))
    if not isinstance(rows, list):
        _refuse(str(path), f"got a JSON {type(rows).__name__}, expected a list of rows", "use .jsonl for a row a line")
    for number, row in enumerate(rows, start=1):
        where = f"{path}:row {number}"
        yield Row(_object(row, where), where)


def _parse(text: str, where: str) -> Any:
    def no_constant(name: str) -> NoReturn:
        _refuse(where, f"got {name}, which is not JSON, expected a number or null", "correct the row")

    def integer(digits: str) -> int:
        try:
            return int(digits)
        except ValueError:
            _refuse(
                where, f"got an integer of {len(digits):,} digits, expected a number of a usual size", "correct it"
            )

    try:
        return json.loads(text, parse_constant=no_constant, parse_int=integer)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        _refuse(
            where, f"got broken JSON at {place} ({error.msg}), expected one object a row", "correct or remove the row"
        )
    except RecursionError:
        _refuse(where, "got JSON nested too deeply, expected a flat row", "correct or remove the row")


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        _refuse(where, f"got a JSON {type(value).__name__}, expected an object with named columns", "correct the row")
    return value


def _csv(path: Path, file: IO[bytes]) -> Iterator[Row]:
    # The line number is the one on which the row ends: a quoted field may hold line breaks.
    reader = csv.reader((f"{text}\n" for _, text in _lines(path, file)), strict=True)
    header: list[str] = []
    try:
        for cells in reader:
            where = f"{path}:{reader.line_num}"
            if not cells:
                continue
            if not header:
                header = cells
                if len(set(header)) != len(header) or not all(header):
                    _refuse(where, f"got header {header}, expected different names", "name each column once")
                continue
            if len(cells) != len(header):
                _refuse(where, f"got {len(cells)} cells, expected {len(header)}", "quote cells that hold commas")
            yield Row(dict(zip(header, cells, strict=True)), where)
    except csv.Error as error:
        _refuse(f"{path}:{reader.line_num}", f"got broken CSV ({error}), expected plain rows", "correct the row")


def _parquet(path: Path, file: IO[bytes]) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        content = io.BytesIO(file.read()) if path.suffix == ".gz" else path
        with pyarrow.parquet.ParquetFile(content) as table:
            for batch in table.iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, f"{path}:row {number}")
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        _refuse(
            f"{path}:row {number + 1}",
            f"got broken parquet ({str(error).splitlines()[0]}), expected a whole file",
            "write it again",
        )


def check_text(row: Row) -> None:
    """Refuse, by file and line, what JSON escapes can hold and UTF-8 and tokenizers cannot: lone surrogates, NUL."""
    for text in _strings(row.values):
        if "\0" in text:
            _refuse(row.where, "got a NUL character, expected text", "remove it")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            _refuse(row.where, "got half of a surrogate pair, expected whole characters", "correct or remove the row")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)

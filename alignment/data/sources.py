"""Rows from wherever a config says: local files, a hub data set, a packaged asset."""

from __future__ import annotations

import difflib
import glob
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from alignment.config import SourceConfig
from alignment.data.assets import ASSETS, fetch_asset
from alignment.data.calculator_drills import lesson_rows, practice_rows
from alignment.data.calculators import calculator_rows, held_out_calculator_rows
from alignment.data.diseases import disease_rows
from alignment.data.files import SUFFIXES, Row, read_file
from alignment.data.hub import remedy, why_offline
from alignment.data.judged_assets import (
    chinese_pair_rows,
    harm_rows,
    held_out_chinese_pair_rows,
    nq_pair_rows,
    nq_ranking_rows,
    off_topic_rows,
    refusal_rows,
    review_rows,
)
from alignment.data.medical import treatment_plan_answers, treatment_plan_pairs
from alignment.data.movielens import rating_rows
from alignment.data.movielens_histories import early_history_rows, history_rows
from alignment.data.movielens_pairs import early_next_title_rows, next_title_rows
from alignment.data.sharegpt import sharegpt_rows

__all__ = ["DERIVED", "Row", "column", "read_rows"]

DERIVED: dict[str, Callable[[], Iterable[Row]]] = {
    "treatment-plans": treatment_plan_pairs,
    "treatment-plan-answers": treatment_plan_answers,
    "disease-table-zh": disease_rows,
    "sharegpt": sharegpt_rows,
    "medical-calculators": calculator_rows,
    "medical-calculators-held-out": held_out_calculator_rows,
    "calculator-lessons": lesson_rows,
    "calculator-practice": practice_rows,
    "refusals": refusal_rows,
    "harm-ratings": harm_rows,
    "reviews-zh": review_rows,
    "nq-pairs": nq_pair_rows,
    "off-topic": off_topic_rows,
    "nq-rankings": nq_ranking_rows,
    "pairs-zh": chinese_pair_rows,
    "pairs-zh-held-out": held_out_chinese_pair_rows,
    "movielens-100k": rating_rows,
    "movielens-pairs": next_title_rows,
    "movielens-early-pairs": early_next_title_rows,
    "movielens-histories": history_rows,
    "movielens-early-histories": early_history_rows,
}
"""Assets whose rows are built from an archive's files, not read as they stand."""


def read_rows(source: SourceConfig) -> list[Row]:
    """All rows of the source, in order, at most `source.limit`.

    Raises:
        ValueError: nothing there, nothing in it, or a broken row (`file:line: reason`).
    """
    rows = list(islice(_rows(source), source.limit))
    if not rows:
        named = source.path or source.hub or source.asset
        raise ValueError(f"data source {named!r}: got no rows, expected at least one; point it at a file with rows")
    return rows


def column(row: Row, key: str) -> Any:
    """The value of a column that must be there and not null."""
    value = row.values.get(key)
    if value is None:
        near = difflib.get_close_matches(key.lower(), [str(name).lower() for name in row.values], n=1)
        same = [name for name in row.values if near and str(name).lower() == near[0] and name != key]
        hint = f"did you mean {same[0]!r}?" if same else "name another column, or correct the row"
        state = "null" if key in row.values else "no such column"
        raise ValueError(
            f"{row.where}: {key!r}: got {state}, expected a value; columns are {list(row.values)}; {hint}"
        )
    return value


def _rows(source: SourceConfig) -> Iterator[Row]:
    if source.path is not None:
        yield from _from_files(expand(source.path))
    elif source.hub is not None:
        yield from _from_hub(source.hub, source.hub_split)
    else:
        assert source.asset is not None
        yield from _from_asset(source.asset)


def _from_files(files: list[Path]) -> Iterator[Row]:
    for file in files:
        yield from read_file(file)


def expand(pattern: str) -> list[Path]:
    """The files that a path or a glob names, in order.

    Raises:
        ValueError: none.
    """
    try:
        path = Path(pattern).expanduser()
    except RuntimeError as error:
        raise ValueError(f"data source: got {pattern!r} ({error}), expected a file or a glob; correct it") from error
    if path.is_file():
        return [path]
    if path.is_dir():
        raise ValueError(
            f"data source: got folder {pattern!r}, expected a file or a glob; try {pattern.rstrip('/')}/*"
        )
    files = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    files = [file for file in files if file.is_file()]
    if not files:
        raise ValueError(
            f"data source: got {pattern!r}, which matches no file, expected at least one; correct the path"
        )
    return files


def _from_asset(name: str) -> Iterator[Row]:
    if name in DERIVED:
        yield from DERIVED[name]()
        return
    tables = [key for key, asset in ASSETS.items() if any(suffix in asset.members[0] for suffix in SUFFIXES)]
    if name not in tables:
        choices = sorted({*tables, *DERIVED})
        near = difflib.get_close_matches(name, choices, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else "choose one of them"
        raise ValueError(f"data asset: got {name!r}, expected one of {choices}; {hint}")
    path = fetch_asset(name)
    yield from _from_files(sorted(path.iterdir()) if path.is_dir() else [path])


def _from_hub(name: str, split: str) -> Iterator[Row]:
    for number, values in enumerate(load_hub(name, split), start=1):
        yield Row(dict(values), f"{name}[{split}]:row {number}")


def load_hub(name: str, split: str) -> Any:
    """A split of a hub data set, memory-mapped.

    Raises:
        ValueError: it cannot be loaded.
    """
    # Asked before the import, which reads whether there is a hub to talk to.
    trouble = None if Path(name).is_dir() else why_offline()
    import datasets

    try:
        return datasets.load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        reason = "; ".join([str(error).strip().splitlines()[0], *([trouble] if trouble else [])])
        raise ValueError(
            f"data.source.hub: got {name!r}, split {split!r}, which could not be loaded ({reason}), expected a data "
            f"set of the hub or its cache; {remedy('data.source.path or data.source.asset')}"
        ) from error

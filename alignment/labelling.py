"""A person's word on pairs of a round: which lines are asked, and what the lines that come back say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignment.ranking import Row

RANKS = ([1, 2], [2, 1])


def asked_rows(rows: Sequence[Row], number: int) -> list[Row]:
    """Lines of `to_label.jsonl`: those of `alignment.ranking.rows_to_label`, with the round that they are of."""
    return [{**row, "round": number} for row in rows]


def check_labelled(row: Mapping[str, Any], where: str) -> None:
    """Refuse a line that says nothing, or whose round is unknown.

    Raises:
        ValueError: naming the line.
    """
    if row.get("ranks") not in RANKS:
        raise ValueError(
            f"{where}: 'ranks': got {row.get('ranks')!r}, expected [1, 2] or [2, 1], 1 the better answer; set it, or "
            "remove a line that you cannot tell"
        )
    if type(row.get("round")) is not int:
        raise ValueError(
            f"{where}: 'round': got {row.get('round')!r}, expected the number that to_label.jsonl has; put it back"
        )


def labelled_pairs(labelled: Sequence[tuple[str, Mapping[str, Any]]], asked: Sequence[Row]) -> list[Row]:
    """Rows of pairs, as `alignment.ranking.pair_row` has them but for the scores, which did not decide.

    Args:
        labelled: place and values of lines that `check_labelled` has passed, all of the round that was asked.
        asked: what `rows_to_label` gave of that round.

    Raises:
        ValueError: a line that was not asked, or that is there twice.
    """
    known = {row["group"]: row["answers"] for row in asked}
    pairs: dict[str, Row] = {}
    for where, row in labelled:
        group, answers = str(row.get("group")), row.get("answers")
        if group not in known or answers != known[group] or group in pairs:
            what = "a pair that is there twice" if group in pairs else "a pair that was not asked in this round"
            raise ValueError(
                f"{where}: got {what}, expected lines of to_label.jsonl with nothing but 'ranks' changed; remove it"
            )
        better = row["ranks"].index(1)
        pairs[group] = {
            "prompt": row["prompt"],
            "chosen": answers[better],
            "rejected": answers[1 - better],
            "group": group,
        }
    return list(pairs.values())

"""A person's word on pairs of a round: which lines are asked, and what the lines that come back say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignment.ranking import Row

RANKS = ([1, 2], [2, 1], None)
"""What may come back: which answer is the better one, or that the person cannot tell."""

Labelled = Sequence[tuple[str, Mapping[str, Any]]]
"""Place and values of lines that `check_labelled` has passed."""


def asked_rows(rows: Sequence[Row], number: int) -> list[Row]:
    """Lines of `to_label.jsonl`: those of `alignment.ranking.rows_to_label`, with the round that they are of."""
    return [{**row, "round": number} for row in rows]


def same_question(row: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Whether two lines ask the same, whatever their ranks say."""
    return all(row.get(key) == asked[key] for key in ("prompt", "answers", "group", "round"))


def check_labelled(row: Mapping[str, Any], where: str, *, num_rounds: int) -> None:
    """Refuse a line that says nothing, or whose round is unknown.

    Raises:
        ValueError: naming the line.
    """
    ranks = row.get("ranks", ())
    # True and 1.0 are equal to 1.
    if ranks not in RANKS or any(type(rank) is not int for rank in ranks or ()):
        raise ValueError(
            f"{where}: 'ranks': got {row.get('ranks')!r}, expected [1, 2] or [2, 1], 1 the better answer, or null "
            "where you cannot tell; set it"
        )
    number, answers = row.get("round"), row.get("answers")
    if type(number) is not int or not 0 <= number < num_rounds:
        raise ValueError(
            f"{where}: 'round': got {number!r}, expected the number that to_label.jsonl has, below {num_rounds}; put "
            "it back"
        )
    if not isinstance(answers, list) or len(answers) != 2:
        raise ValueError(f"{where}: 'answers': got {answers!r}, expected the two of to_label.jsonl; put them back")


def labelled_pairs(labelled: Labelled, asked: Sequence[Row]) -> list[Row]:
    """Rows of pairs, as `alignment.ranking.pair_row` has them but for the scores, which did not decide. A line whose
    ranks are null gives none.

    Args:
        labelled: all of the round that was asked.
        asked: what `asked_rows` gave of that round.

    Raises:
        ValueError: a line that was not asked, or that is there twice.
    """
    known = {row["group"]: row for row in asked}
    pairs: list[Row] = []
    told: set[str] = set()
    for where, row in labelled:
        group = str(row.get("group"))
        if group not in known or not same_question(row, known[group]) or group in told:
            what = "a pair that is there twice" if group in told else "a pair that was not asked in this round"
            raise ValueError(
                f"{where}: got {what}, expected lines of to_label.jsonl with nothing but 'ranks' changed; remove it"
            )
        told.add(group)
        if choice := _choice(row):
            pairs.append({"prompt": row["prompt"], "chosen": choice[0], "rejected": choice[1], "group": group})
    return pairs


def left_out_lines(labelled: Labelled, learnt: Sequence[Sequence[Row]]) -> list[str]:
    """Places of lines that say something else than what was read when their round was.

    `learnt`: the pairs of each round that was read, from round 0."""
    choices = [{pair["group"]: (pair["chosen"], pair["rejected"]) for pair in pairs} for pairs in learnt]
    return [
        where
        for where, row in labelled
        if row["round"] < len(choices) and choices[row["round"]].get(str(row.get("group"))) != _choice(row)
    ]


def early_lines(labelled: Labelled, number: int) -> list[str]:
    """Places of lines of rounds after `number`, the first that has not been read."""
    return [where for where, row in labelled if row["round"] > number]


def _choice(row: Mapping[str, Any]) -> tuple[Any, Any] | None:
    """The better answer and the other one; None where the person cannot tell."""
    if row["ranks"] is None:
        return None
    better = row["ranks"].index(1)
    return row["answers"][better], row["answers"][1 - better]

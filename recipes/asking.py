"""A person's word on the pairs of a round: the file that they are asked by, and the one in which they answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignment.config import IterativeRunConfig
from alignment.data.files import Row, read_file
from alignment.labelling import asked_rows, check_labelled, early_lines, labelled_pairs, left_out_lines, same_question
from alignment.loops.iterative import RankedRound, answer_figures
from alignment.loops.ranking import AnsweredBatch
from alignment.ranking import by_prompt, rows_to_label, score_figures
from alignment.run_directory import write_text_atomic

TO_LABEL = "to_label.jsonl"
"""In the run's directory: what is asked about the round that waits."""


def read_labels(config: IterativeRunConfig) -> list[Row]:
    """What a person has said so far; nothing where there is no such person, or no file yet.

    Raises:
        ValueError: `file:line: reason` for a line that says nothing.
    """
    path = config.rounds.labels
    if path is None or not Path(path).expanduser().exists():
        return []
    rows = list(read_file(Path(path).expanduser()))
    for row in rows:
        check_labelled(row.values, row.where, num_rounds=config.num_rounds)
    return rows


def tell_unused(config: IterativeRunConfig, learnt: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Name the lines that nothing is learnt from. `learnt`: the pairs of each round that has been read."""
    labelled = [(row.where, row.values) for row in read_labels(config)]
    if late := left_out_lines(labelled, learnt):
        print(
            f"{config.rounds.labels}: what these lines say is left out, since it was not there when their round was "
            f"read: {_numbers(late)}",
            flush=True,
        )
    if early := early_lines(labelled, len(learnt)):
        print(f"{config.rounds.labels}: the round of these lines is yet to be asked: {_numbers(early)}", flush=True)


def judge_by_person(
    config: IterativeRunConfig, folder: Path, number: int, answered: AnsweredBatch
) -> RankedRound | None:
    """The pairs of a round that a person has told; None, and what to do, where that person has yet to look.

    `folder`: of the run."""
    ranking = config.ranking
    asked = asked_rows(
        rows_to_label(answered.answers, most=ranking.num_to_label, unsure_by=ranking.unsure_by, on_cut=ranking.on_cut),
        number,
    )
    told = [(row.where, row.values) for row in read_labels(config) if row.values["round"] == number]
    if asked and not told:
        marked = ask(asked, folder / TO_LABEL)
        there = f"; {marked} of them have theirs already and only need to be added" if marked else ""
        print(
            f"round {number} waits: {len(asked)} pairs in {folder / TO_LABEL}; set 'ranks' of each to [1, 2] or "
            f"[2, 1], 1 the better answer, or to null where you cannot tell, add the lines to {config.rounds.labels}, "
            f"and start the same command again{there}",
            flush=True,
        )
        return None
    rows = labelled_pairs(told, asked)
    prompts = list(by_prompt(answered.answers).values())
    figures = {
        **score_figures(prompts, seed=config.run.seed),
        "asked": len(asked),
        "pairs": len(rows),
        "share_of_prompts_with_a_pair": len(rows) / len(prompts) if prompts else 0.0,
    }
    return RankedRound(rows=rows, figures={**figures, **answer_figures(answered)})


def ask(asked: Sequence[dict[str, Any]], path: Path) -> int:
    """Write the questions down, unless some of them are there: somebody may be at work on them.

    Returns:
        How many of those that are there have an answer.

    Raises:
        ValueError: `file:line: reason` for a line that cannot be read.
    """
    there = [row.values for row in read_file(path)] if path.exists() else []
    kept = [row for row in there if any(same_question(row, one) for one in asked)]
    if not kept:
        write_text_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in asked))
    return sum(row.get("ranks") != asked[0]["ranks"] for row in kept)


def _numbers(places: Sequence[str]) -> str:
    return ", ".join(where.rpartition(":")[2] for where in places)

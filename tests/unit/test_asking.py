"""A person's round on disk: what is asked stays while somebody is at work on it, and what they say is not lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignment.config import IterativeRunConfig
from alignment.loops.ranking import AnsweredBatch
from alignment.ranking import ScoredAnswer
from recipes.asking import judge_by_person, read_labels, tell_unused


def answered() -> AnsweredBatch:
    """Two answers to each of three prompts, of almost the same scores."""
    return AnsweredBatch(
        answers=[
            ScoredAnswer(
                prompt_id=f"p{i}",
                prompt=f"{i}?",
                sample_index=j,
                response=f"answer {i}.{j}",
                finished=True,
                num_tokens=3,
                score=float(i * j),
                parts={"form": float(j)},
            )
            for i in range(3)
            for j in range(2)
        ]
    )


@pytest.fixture
def config(tmp_path) -> IterativeRunConfig:
    return IterativeRunConfig.model_validate(
        {
            "reward": {"functions": [{"name": "text:finished_sentence"}]},
            "rounds": {"label_by": "person", "labels": str(tmp_path / "labelled.jsonl")},
            "ranking": {"num_to_label": 3},
        }
    )


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: str | Path | None, rows: list[dict]) -> None:
    assert path is not None
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_questions_at_which_somebody_is_at_work_stay_as_they_are(config, tmp_path, capsys):
    file = tmp_path / "to_label.jsonl"
    assert judge_by_person(config, tmp_path, 0, answered()) is None
    assert [row["ranks"] for row in lines(file)] == [[1, 1]] * 3
    assert "have theirs already" not in capsys.readouterr().out
    work = [{**row, "ranks": ranks} for row, ranks in zip(lines(file), ([2, 1], None), strict=False)]
    write(file, work)
    assert judge_by_person(config, tmp_path, 0, answered()) is None
    assert lines(file) == work
    said = capsys.readouterr().out
    assert f"add the lines to {config.rounds.labels}" in said
    assert "2 of them have theirs already" in said
    assert judge_by_person(config, tmp_path, 1, answered()) is None
    assert [(row["round"], row["ranks"]) for row in lines(file)] == [(1, [1, 1])] * 3


def test_a_person_who_can_tell_nothing_goes_on_without_pairs(config, tmp_path):
    judge_by_person(config, tmp_path, 0, answered())
    write(config.rounds.labels, [{**lines(tmp_path / "to_label.jsonl")[0], "ranks": None}])
    found = judge_by_person(config, tmp_path, 0, answered())
    assert found is not None
    assert (found.rows, found.figures["asked"], found.figures["pairs"]) == ([], 3, 0)


def test_an_empty_file_says_nothing(config, tmp_path):
    write(config.rounds.labels, [])
    assert read_labels(config) == []
    assert judge_by_person(config, tmp_path, 0, answered()) is None


def test_what_came_too_late_is_told(config, tmp_path, capsys):
    judge_by_person(config, tmp_path, 0, answered())
    told = [{**row, "ranks": [2, 1]} for row in lines(tmp_path / "to_label.jsonl")]
    write(config.rounds.labels, told[:1])
    found = judge_by_person(config, tmp_path, 0, answered())
    write(config.rounds.labels, [*told, {**told[0], "round": 2}])
    capsys.readouterr()
    tell_unused(config, [found.rows])
    said = capsys.readouterr().out.splitlines()
    assert [line.rpartition(": ")[2] for line in said] == ["2, 3", "4"]
    write(config.rounds.labels, [*told, {**told[0], "round": 3}])
    with pytest.raises(ValueError, match=r"labelled.jsonl:4: 'round': got 3, expected .* below 3"):
        read_labels(config)

"""A run on pairs has the stages run first that make its model and its rows."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from recipes import checks, dpo_medical, rank_answers, sft_calculators


@pytest.fixture(autouse=True)
def _same_umask_afterwards():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def flags(tiny, tmp_path, monkeypatch) -> list[str]:
    """The recipes themselves, with tiny models and rows that are here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checks, "_base_of", lambda recipe: str(tiny / "policy"))
    rows = [{"prompt": f"What is {i}?", "completion": "It is."} for i in range(9)]
    (tmp_path / "lessons.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lessons = ["--model.path", str(tiny / "policy"), "--data.sources", f"[{{path: {tmp_path}/lessons.jsonl}}]"]
    lessons += ["--data.held_out", "2", "--run.num_steps", "2"]
    ranked = ["--data.source.path", str(tiny / "prompts.jsonl"), "--data.prompt_key", "question"]
    ranked += ["--data.held_out", "4", "--rollout.engine", "transformers", "--rollout.max_new_tokens", "8"]
    ranked += [
        "--reward.functions",
        '[{name: "text:no_repetition"}]',
        "--ranking.min_gap",
        "0.01",
        "--ranking.on_cut",
        "keep",
    ]
    ranked += ["--model.path", "runs/sft_calculators/final", "--model.dtype", "float32"]
    for recipe, own in ((sft_calculators, lessons), (rank_answers, ranked)):
        monkeypatch.setattr(recipe, "main", lambda given, main=recipe.main, own=own: main([*given, *own]))
    more = ["--run.num_steps", "2", "--training.batch_size", "4", "--data.held_out", "2"]
    more += ["--evaluation.source", "null", "--evaluation.functions", "[]", "--training.validate_every", "0"]
    return ["--local", "--output-dir", str(tmp_path / "runs" / "dpo"), "--model.dtype", "float32", *more]


def test_a_dry_run_says_what_would_be_made_first(flags, capsys):
    assert dpo_medical.main([*flags, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "runs/sft_calculators/final is not there yet: it would be made first" in told
    assert "runs/rank_answers/final is not there yet" in told
    assert not Path("runs").exists()


def test_the_stages_run_first_and_their_rows_are_learnt(flags, capsys):
    assert dpo_medical.main(flags) == 0
    told = capsys.readouterr().err
    assert told.index("runs/sft_calculators/final is not there yet") < told.index("runs/rank_answers/final is not")
    assert Path("runs/rank_answers/final/pairs.jsonl").is_file()
    summary = json.loads(Path("runs/dpo/summary.json").read_text())
    assert summary["held_out"]["implicit_accuracy"]["n"] >= 2


def test_what_an_earlier_stage_refuses_is_refused_before_any_is_run(flags, capsys, monkeypatch):
    main = rank_answers.main
    monkeypatch.setattr(rank_answers, "main", lambda given: main([*given, "--ranking.num_samples_per_prompt", "0"]))
    assert dpo_medical.main(flags) == 2
    assert "rank_answers: refused" in capsys.readouterr().err
    assert not Path("runs").exists()

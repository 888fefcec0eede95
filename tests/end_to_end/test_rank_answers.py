"""A policy's answers ranked by a recipe: what it leaves, killed and taken up again, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import sys
from pathlib import Path

import pytest
from tiny_preferences import read_pairs
from warm import run_script

from alignment.config import RewardDataConfig, SourceConfig
from alignment.data.chat import load_tokenizer
from alignment.data.judgements import load_judgements
from alignment.data.prompts import load_prompts
from alignment.fingerprint import model_fingerprint
from alignment.loops.ranking import AnswerLog
from recipes import checks, rank_answers, sft_calculators
from recipes.common import parse

FILES = ("answers.jsonl", "pairs.jsonl", "labels.jsonl", "to_label.jsonl", "README.md")
CONFIG = """
data: {{source: {{path: {tiny}/prompts.jsonl}}, held_out: 4}}
model: {{path: {tiny}/policy}}
reward:
  functions: [{{name: "text:length_between", settings: {{min_words: 6, max_words: 9}}}}]
  gold: [{{name: "text:no_repetition"}}]
rollout: {{engine: transformers, max_new_tokens: 24, stop: [a, e, i, o, "1", "2", "3", "4"]}}
ranking: {{num_samples_per_prompt: 4, batch_size: 3, pairs_per_prompt: 2, num_to_label: 3}}
"""


@pytest.fixture(autouse=True)
def _same_umask_afterwards():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rank") / "rank.yaml"
    path.write_text(CONFIG.format(tiny=tiny))
    return path


def flags(config: Path, output: Path, *more: str) -> list[str]:
    return ["--local", "--config", str(config), "--output-dir", str(output), *more]


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole") / "run"
    before = os.umask(0o022)
    assert rank_answers.main(flags(config, output)) == 0
    os.umask(before)
    return output


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def final(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (output / "final").iterdir()}


def test_what_a_run_leaves(tiny, config, whole):
    job = parse("rank_answers", rank_answers.RankRunConfig, flags(config, whole))
    tokenizer = load_tokenizer(str(tiny / "policy"))
    prompts = load_prompts(job.config.data, tokenizer)
    answers, pairs, labels = (rows(whole / "final" / name) for name in FILES[:3])
    assert set(final(whole)) == set(FILES)
    assert [a["prompt_id"] for a in answers] == [p.id for p in prompts.train for _ in range(4)]
    assert [a["sample_index"] for a in answers] == [0, 1, 2, 3] * 20
    assert all(set(a["parts"]) == {"text:length_between", "gold/text:no_repetition"} for a in answers)
    assert not any("<|im_end|>" in a["response"] for a in answers)
    finished = {(a["prompt_id"], a["response"]) for a in answers if a["finished"]}
    assert 0 < len(finished) < 80, "of a random model some end and some are cut"
    assert all((row["group"], row["chosen"]) in finished for row in pairs)
    assert all((row["group"], row["completion"]) in finished for row in labels if row["label"])
    assert all(row["chosen_score"] > row["rejected_score"] for row in pairs)
    assert 0 < len(rows(whole / "final" / "to_label.jsonl")) <= 3
    everything = "".join((whole / "final" / name).read_text() for name in FILES) + (whole / "batches.txt").read_text()
    for prompt in prompts.held_out:
        assert not re.search(rf"{re.escape(prompt.messages[-1]['content'])}", everything)
        assert prompt.id not in everything
    for path in (whole / "final").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    figures = json.loads((whole / "summary.json").read_text())["ranking"]
    assert (figures["prompts"], figures["answers"], figures["pairs"]) == (20, 80, len(pairs))
    assert figures["desirable"] + figures["undesirable"] == len(labels)
    metrics = rows(whole / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(7))
    assert all("reward/gold/text:no_repetition/mean" in row for row in metrics)


def test_its_rows_are_what_the_next_stages_read(tiny, whole):
    tokenizer = load_tokenizer(str(tiny / "policy"))
    source = SourceConfig(path=str(whole / "final" / "pairs.jsonl"))
    pairs = read_pairs(source, tokenizer, held_out=4)
    assert len(pairs.train) + len(pairs.held_out) == len(rows(whole / "final" / "pairs.jsonl"))
    source = SourceConfig(path=str(whole / "final" / "labels.jsonl"))
    labels = load_judgements(RewardDataConfig(source=source, held_out=4), tokenizer)
    assert labels.kind == "labels"
    assert len(labels.train) + len(labels.held_out) == len(rows(whole / "final" / "labels.jsonl"))


KILLED = """
import os, signal, sys
sys.path.insert(0, os.getcwd())
from alignment.fingerprint import model_fingerprint
from alignment.loops.ranking import AnswerLog
from recipes import rank_answers
append = AnswerLog.append
def killed(log, index, batch):
    append(log, index, batch)
    if index == {last}:
        with open(log.path, "r+b") as file:
            file.truncate(os.path.getsize(log.path) - {bytes})
        os.kill(os.getpid(), signal.SIGKILL)
AnswerLog.append = killed
rank_answers.main(sys.argv[1:])
"""


@pytest.mark.parametrize(("last", "num_bytes", "kept"), [pytest.param(2, 0, 3, marks=pytest.mark.slow), (3, 40, 3)])
def test_killed_at_a_batch_or_within_its_line_it_ends_with_the_same_bytes(
    config, whole, tmp_path, last, num_bytes, kept
):
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(last=last, bytes=num_bytes))
    done = run_script([sys.executable, str(script), *flags(config, tmp_path / "run")], timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "run" / "final").exists()
    assert rank_answers.main(flags(config, tmp_path / "run")) == 0
    assert final(tmp_path / "run") == final(whole)
    assert (tmp_path / "run" / "batches.txt").read_bytes() == (whole / "batches.txt").read_bytes()
    steps = [row["step"] for row in rows(tmp_path / "run" / "metrics.jsonl")]
    assert steps[-(7 - kept) :] == list(range(kept, 7)), "what was answered is not answered again"


def test_a_damaged_batch_is_answered_again_with_those_behind_it(config, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    log = tmp_path / "run" / "batches.txt"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:2], lines[2].replace(b'"score": ', b'"score": 1', 1), *lines[3:]]))
    (tmp_path / "run" / "final" / "README.md").unlink()
    assert rank_answers.main(flags(config, tmp_path / "run")) == 0
    assert final(tmp_path / "run") == final(whole)
    assert len(AnswerLog(log).read()) == 7


def test_a_finished_run_is_told_again_without_an_actor(config, whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "run")
    monkeypatch.setattr("recipes.ranking.rank_actors", None)
    assert rank_answers.main(flags(config, tmp_path / "run")) == 0
    assert final(tmp_path / "run") == final(whole)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--run.seed", "2"], "run.seed: 1 -> 2"),
        (["--resume", "never"], "--resume never: got a run in"),
        (["--resume", "elsewhere"], "--resume: got elsewhere (no such folder), expected a complete checkpoint"),
    ],
)
def test_another_run_does_not_go_on_in_its_directory(config, whole, tmp_path, capsys, more, said):
    shutil.copytree(whole, tmp_path / "run")
    assert rank_answers.main(flags(config, tmp_path / "run", *more)) == 2
    assert said in capsys.readouterr().err
    assert final(tmp_path / "run") == final(whole)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--reward.functions", "[{name: 'numbers:final_number'}]"], "expected column 'answer'"),
        (["--ranking.on_cut", "drop"], 'ranking.on_cut: got "drop", expected reject|skip|keep'),
        (["--rollout.max_new_tokens", "600"], "rollout.max_new_tokens"),
        (["--model.path", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_is_refused_at_the_door(config, tmp_path, capsys, more, said):
    assert rank_answers.main(flags(config, tmp_path / "run", *more)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def with_answers(tiny: Path, config: Path, folder: Path, answers: list[object]) -> list[str]:
    """Prompts whose column `answer` numbers:final_number reads; null has no score."""
    lines = [{"question": f"What is {i}?", "answer": answer} for i, answer in enumerate(answers)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    reward = "[{name: 'numbers:final_number'}]"
    given = ["--data.source.path", str(folder / "rows.jsonl"), "--data.held_out", "0", "--reward.functions", reward]
    return flags(config, folder / "run", *given, "--reward.gold", "[]", "--ranking.batch_size", "2")


def test_answers_without_a_score_are_left_out_and_counted(tiny, config, tmp_path):
    given = with_answers(tiny, config, tmp_path, [1, None, 3, 4])
    assert rank_answers.main([*given, "--reward.max_unscorable", "0.5"]) == 0
    answers = rows(tmp_path / "run" / "final" / "answers.jsonl")
    assert [a["columns"]["answer"] for a in answers] == [1] * 4 + [3] * 4 + [4] * 4
    figures = json.loads((tmp_path / "run" / "summary.json").read_text())["ranking"]
    assert sum(count for name, count in figures.items() if name.startswith("unscored_")) == 4
    assert (figures["prompts"], figures["answers"]) == (3, 12)


def test_more_of_them_than_the_budget_end_the_run(tiny, config, tmp_path, capsys):
    given = with_answers(tiny, config, tmp_path, [1, 2, None, 4])
    assert rank_answers.main(given) == 1
    assert "got 4 of 8 answers without a score" in capsys.readouterr().err
    assert len(AnswerLog(tmp_path / "run" / "batches.txt").read()) == 1
    assert not (tmp_path / "run" / "final").exists()


def test_a_column_that_json_cannot_hold_is_refused(tiny, config, tmp_path, capsys):
    import datetime

    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"question": ["What is 1?"] * 3, "answer": [datetime.date(2024, 1, 1)] * 3})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    given = with_answers(tiny, config, tmp_path, [1])
    assert rank_answers.main([*given, "--data.source.path", str(tmp_path / "rows.parquet")]) == 2
    assert "column 'answer'" in (said := capsys.readouterr().err)
    assert "got a date that JSON cannot hold" in said


def test_a_dry_run_counts_and_starts_nothing(config, tmp_path, capsys):
    assert rank_answers.main(flags(config, tmp_path / "run", "--dry-run")) == 0
    said = capsys.readouterr().out
    assert "20 prompts x 4 samples = 80 answers in 7 batches of 3 prompts" in said
    assert "dry run: no actor was started" in said
    assert not (tmp_path / "run").exists()


def test_the_policy_that_answers_is_trained_first(tiny, config, tmp_path, monkeypatch, capsys):
    """What runs it has a config whose data is here; the stand-in for its model is the tiny one."""
    lessons = tmp_path / "lessons.jsonl"
    rows = [{"prompt": f"What is {i}?", "completion": "It is."} for i in range(9)]
    lessons.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--model.path", str(tiny / "policy"), "--data.sources", f"[{{path: {lessons}}}]", "--data.held_out", "2"]
    train = sft_calculators.main
    monkeypatch.setattr(sft_calculators, "main", lambda own: train([*own, *given, "--run.num_steps", "1"]))
    monkeypatch.setattr(checks, "_base_of", lambda recipe: str(tiny / "policy"))
    final = tmp_path / "sft_calculators" / "final"
    more = ["--model.path", str(final), "--data.source.limit", "6", "--data.held_out", "2"]
    assert rank_answers.main(flags(config, tmp_path / "run", *more, "--dry-run")) == 0
    assert f"{final} is not there yet: it would be trained first" in capsys.readouterr().out
    assert rank_answers.main(flags(config, tmp_path / "run", *more)) == 0
    inputs = json.loads((tmp_path / "run" / "inputs.json").read_text())
    assert inputs["model"] == model_fingerprint(str(final))


@pytest.mark.parametrize("name", ["pairs.jsonl", "labels.jsonl", ""])
def test_a_data_source_in_its_final_names_it_until_it_is_whole(tmp_path, name):
    final = tmp_path / "rank_answers" / "final"
    path = str(final / name)
    assert checks.upstream_of(path) == "rank_answers"
    assert checks.not_yet_made([path, None, "elsewhere/rows.jsonl"]) == {"rank_answers": tmp_path / "rank_answers"}
    final.mkdir(parents=True)
    (final / "README.md").write_text("whole")
    assert checks.upstream_of(path) is None

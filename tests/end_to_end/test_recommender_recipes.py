"""The recommender's recipes, whole: films ranked before and after, choices learnt once whatever ends the run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from dataclasses import asdict
from pathlib import Path

import pytest
import tiny_films
import torch
from safetensors.torch import load_file
from tiny_films import NUM_TEST, table_of, write_recommender

from alignment import plan
from alignment.data.movielens_live import live_choices
from alignment.data.recommendation_cases import recommendation_cases
from alignment.feedback_log import FeedbackReader
from alignment.recommendation_report import case_metrics, means
from recipes import dpo_recommender, dpo_recommender_early, live_recommender

ROOT = Path(__file__).resolve().parents[2]
STEPS = ["--run.num_steps", "3"]
TIMEOUT = 280


@pytest.fixture(scope="module", autouse=True)
def _same_umask_afterwards():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """Tables, pairs and configs, and the model that live runs begin with."""
    folder = write_recommender(tmp_path_factory.mktemp("recommender"), tiny / "policy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYLIGN_CACHE", str(folder / "cache"))
        assert dpo_recommender_early.main(flags(folder, "early", folder / "early")) == 0
        yield folder


def flags(folder: Path, config: str, output: Path, *more: str) -> list[str]:
    return ["--local", "--config", str(folder / f"{config}.yaml"), "--output-dir", str(output), *more]


def numbers(output: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("timing/")} for row in rows]


def final(output: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(output / "final/model.safetensors").items()}


def summary(output: Path) -> dict:
    return json.loads((output / "summary.json").read_text())


def assert_same(ours: Path, theirs: Path) -> None:
    assert numbers(ours) == numbers(theirs)
    assert final(ours) == final(theirs)
    for part in ("held_out", "films"):
        assert summary(ours)[part] == summary(theirs)[part]


@pytest.fixture(scope="module")
def undisturbed(folder) -> Path:
    """Three steps on the first six choices."""
    assert live_recommender.main(flags(folder, "live", folder / "undisturbed", *STEPS)) == 0
    return folder / "undisturbed"


def events(folder: Path) -> list[dict]:
    made, _ = live_choices(table_of(folder / "tables").without_test(NUM_TEST), per_user=1)
    return [asdict(event) for event in made]


def test_films_are_ranked_before_and_after(folder, tmp_path, capsys):
    assert dpo_recommender.main(flags(folder, "offline", tmp_path / "run", "--films.num_people", "9")) == 0
    told, found = capsys.readouterr(), summary(tmp_path / "run")
    rows = json.loads((tmp_path / "run" / "films.json").read_text())
    assert len(rows) == found["films"]["people"] == 9
    every = recommendation_cases(table_of(folder / "tables"), num_negatives=14)
    cases = [case for case in every if case.user in {row["user"] for row in rows}]
    assert [list(case.films) for case in cases] == [row["films"] for row in rows]
    after = means(cases, case_metrics(cases, [row["after"] for row in rows]))
    gaps = [[a - b for a, b in zip(row["after"], row["before"], strict=True)] for row in rows]
    implicit = means(cases, case_metrics(cases, gaps))
    for name in after:
        assert found["held_out"][f"likelihood/{name}"]["after"] == pytest.approx(after[name])
        assert found["held_out"][f"implicit/{name}"]["after"] == pytest.approx(implicit[name])
    assert found["held_out"]["implicit/uniform/hit_rate"]["before"] == pytest.approx(10 / 15)
    assert found["held_out"]["implicit/uniform/hit_rate"]["n"] == 9
    assert "item neighbours of all that was liked" in told.out
    card = (tmp_path / "run" / "final" / "README.md").read_text()
    assert "sha256 of films" in card
    for text in (told.out, told.err, card):
        assert "Odd 1" not in text


def test_before_is_of_the_model_that_the_one_that_learns_was_made_from(folder, tiny, tmp_path, capsys):
    """A run that goes on from the early model, beside the untrained one: its scores are those that are known."""
    given = ["--model.path", str(folder / "early" / "final"), "--run.num_steps", "1"]
    assert dpo_recommender_early.main(flags(folder, "early", tmp_path, *given, "--base", str(tiny / "policy"))) == 0
    rows = json.loads((tmp_path / "films.json").read_text())
    early = json.loads((folder / "early" / "films.json").read_text())
    assert [row["before"] for row in rows] == [row["before"] for row in early]
    start = [row["after"] for row in early]
    steps = [abs(a - b) for row, own in zip(rows, start, strict=True) for a, b in zip(row["after"], own, strict=True)]
    far = [abs(a - b) for row in rows for a, b in zip(row["after"], row["before"], strict=True)]
    assert sum(steps) < sum(far)
    assert "films: " not in capsys.readouterr().err.split("step 1/1")[0]  # nobody had to be asked before


def test_a_base_of_other_titles_is_refused(folder, tiny, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(tiny / "policy", other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["O"], words["E"] = words["E"], words["O"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert dpo_recommender.main(flags(folder, "offline", tmp_path / "run", "--base", str(other))) == 2
    assert "whose tokenizer spells titles otherwise" in capsys.readouterr().err


def test_a_recommender_learns_from_choices(folder, undisturbed, capsys):
    """Its base's scores are those that the run before it left; its own before are those of the model it began with."""
    found, rows = summary(undisturbed), json.loads((undisturbed / "films.json").read_text())
    early = {row["user"]: row for row in json.loads((folder / "early" / "films.json").read_text())}
    assert [row["base"] for row in rows] == [early[row["user"]]["before"] for row in rows]
    for row in rows:
        # `final` has the adapter merged: the same numbers, rounded once more.
        torch.testing.assert_close(torch.tensor(row["before"]), torch.tensor(early[row["user"]]["after"]))
        assert row["after"] != row["before"]
    assert found["feedback"]["learnt"] == 6
    assert found["feedback"]["pairs"] == 12
    assert [row["feedback/events"] for row in numbers(undisturbed)] == [2, 4, 6]
    logged = [asdict(entry.event) for entry in FeedbackReader(undisturbed / "feedback.jsonl").events()]
    assert logged[:6] == events(folder)[:6]
    assert set(found["films"]["methods"]) >= {"popularity", "before, implicit reward", "after, log-probability"}
    assert list(found["films"]["methods"])[-1] == "after, log-probability"  # what the leads are of


@pytest.mark.parametrize("point", ["learnt", pytest.param("saved", marks=pytest.mark.slow)])
def test_killed_while_learning_it_ends_with_the_same_bits(folder, undisturbed, tmp_path, point):
    output = tmp_path / "run"
    given = flags(folder, "live", output, *STEPS)
    command = [sys.executable, tiny_films.__file__, point, "2", "live_recommender", *given]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert [path.name for path in (output / "checkpoints").glob("step_*")] == ["step_000001"]
    assert live_recommender.main(given) == 0
    assert_same(output, undisturbed)


def post(port: str, event: dict) -> dict:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/feedback", json.dumps(event).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.status == 202
        return json.loads(answer.read())


@pytest.mark.slow
def test_choices_come_by_http_and_a_file_through_sigterm(folder, undisturbed, tmp_path):
    """The first two are learnt when the signal comes; of the next start's, two were sent before."""
    output, chosen = tmp_path / "run", events(folder)
    given = ["--live.replay", "false", "--live.port", "0", "--live.file", str(tmp_path / "choices.jsonl")]
    command = [sys.executable, str(ROOT / "recipes" / "live_recommender.py")]
    command += flags(folder, "live", output, *STEPS, *given)

    def start() -> tuple[subprocess.Popen, str]:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        line = next(line for line in process.stdout if line.startswith("feedback: POST"))
        return process, line.rpartition(":")[2].partition("/")[0]

    process, port = start()
    with process:
        assert [post(port, event)["new"] for event in chosen[:3]] == [1, 1, 1]
        assert next(line for line in process.stdout if line.startswith("step 1/3") and "ETA" in line)
        process.terminate()
        rest = process.stdout.read()
    assert process.returncode == 143, rest[-2000:]
    assert "terminated; step 1 is on disk" in rest or "terminated; no step is on disk" in rest
    process, port = start()
    with process:
        assert [post(port, event)["new"] for event in chosen[1:5]] == [0, 0, 1, 1]
        (tmp_path / "choices.jsonl").write_text("no choice\n" + json.dumps(chosen[5]) + "\n")
        rest = process.stdout.read()
    assert process.returncode == 0, rest[-2000:]
    assert "choices.jsonl:1: got no JSON" in rest
    assert_same(output, undisturbed)
    assert summary(output)["feedback"]["waiting"] == 0


def test_plans_start_nothing(folder, tmp_path, capsys):
    assert dpo_recommender.main(flags(folder, "offline", tmp_path / "run", "--dry-run")) == 0
    assert "films: 17 people are asked about" in capsys.readouterr().out
    assert live_recommender.main(flags(folder, "live", tmp_path / "run", "--dry-run")) == 0
    shown = capsys.readouterr().out
    assert "choices: from 19 choices that are replayed" in shown
    assert "4 pairs a step" in shown
    assert plan.main(["--config", str(folder / "live.yaml")]) == 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--live.replay", "false"], "live: got no source of choices"),
        (["--live.file", ""], 'live.file: got "", expected text'),
        (["--films.folder", ""], 'films.folder: got "", expected text'),
        (["--live.file", "/nowhere/choices.jsonl"], "live.file: got /nowhere/choices.jsonl, expected a file in"),
        (["--live.file", "OUT/feedback.jsonl"], "live.file: got "),
        (["--live.file", "/dev/null"], "live.file: got /dev/null, expected a file in"),
        (["--films.num_people", "1", "--data.max_tokens", "115"], "liked, shown: got 1"),
        (["--training.optimizer.decay", "cosine"], "training.optimizer: got decay=cosine"),
        (["--training.choices_per_step", "99"], "training.choices_per_step: got 99, expected at most the 19"),
        (["--dpo.terms", "[{kind: simpo}]"], "dpo.terms: got ['simpo']"),
        (["--films.num_people", "99"], "films.num_people: got 99, expected at most the"),
        (["--data.max_tokens", "20"], "data.max_tokens: got 20, expected at least"),
        (["--base", "nowhere/at/all"], "nowhere/at/all"),
        (["--live.port", "70000"], "live.port"),
    ],
)
def test_live_runs_that_are_refused_before_the_start(folder, tmp_path, capsys, more, reason):
    (tmp_path / "out").mkdir()
    given = [flag.replace("OUT", str(tmp_path / "out")) for flag in more]
    assert live_recommender.main(flags(folder, "live", tmp_path / "out", *given)) == 2
    assert reason in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_log_that_is_not_the_one_learnt_from_is_refused(folder, undisturbed, tmp_path, capsys):
    output = tmp_path / "run"
    subprocess.run(["cp", "-r", str(undisturbed), str(output)], check=True)
    (output / "feedback.jsonl").unlink()
    assert live_recommender.main(flags(folder, "live", output, *STEPS)) == 2
    assert "got 0 events, expected at least 6, which were taken; put that log back" in capsys.readouterr().err


def test_pairs_that_tell_of_the_tests_are_refused(folder, tmp_path, capsys):
    given = ["--data.sources", "[{asset: movielens-pairs}]"]
    assert dpo_recommender.main(flags(folder, "early", tmp_path / "run", *given)) == 2
    assert "data.sources: got asset movielens-pairs with films.folder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

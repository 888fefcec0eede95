"""The recipe in rounds: through Ray and in one process, killed and taken up again, and with a person's word."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from tiny_rounds import settings_of_rounds, write_letter_prompts

from recipes import iterative_dpo

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 600


@pytest.fixture(autouse=True)
def _same_umask_afterwards():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rounds")
    settings = settings_of_rounds(tiny, write_letter_prompts(folder / "prompts.jsonl"))
    (folder / "rounds.yaml").write_text(yaml.safe_dump(settings))
    return folder


def flags(folder: Path, output: Path, *more: str) -> list[str]:
    return ["--config", str(folder / "rounds.yaml"), "--output-dir", str(output), *more]


def run(script: Path, folder: Path, output: Path, *more: str) -> int:
    command = [sys.executable, str(script), *flags(folder, output, *more)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, cwd=ROOT)
    assert done.returncode in (0, -signal.SIGKILL), done.stdout[-1000:] + done.stderr[-3000:]
    return done.returncode


def final(output: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(output / "final/model.safetensors").items()}


def numbers(output: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("timing/")} for row in rows]


def held_out(output: Path) -> dict[str, dict]:
    return json.loads((output / "summary.json").read_text())["held_out"]


@pytest.fixture(scope="module")
def local(folder):
    assert run(ROOT / "recipes" / "iterative_dpo.py", folder, folder / "local", "--local") == 0
    return folder / "local"


@pytest.mark.slow
def test_through_ray_the_bits_are_those_of_one_process(folder, local):
    assert run(ROOT / "recipes" / "iterative_dpo.py", folder, folder / "ray") == 0
    assert numbers(folder / "ray") == numbers(local)
    assert final(folder / "ray") == final(local)
    assert held_out(folder / "ray") == held_out(local)


KILLED = """
import os, signal, sys
sys.path.insert(0, os.getcwd())
from alignment.loops.iterative import RoundLog
from alignment.loops.run import Run
from recipes import iterative_dpo
owner, name, left = {owner}, "{name}", {count}
own = getattr(owner, name)
def killed(*args, **kwargs):
    global left
    found = own(*args, **kwargs)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return found
setattr(owner, name, killed)
iterative_dpo.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "count"),
    [("RoundLog", "add", 4), ("RoundLog", "ranked", 2), ("Run", "finish_step", 4), ("Run", "checkpoint", 4)],
    ids=["in sampling", "between", "in a step", "between rounds"],
)
def test_killed_anywhere_it_ends_with_the_same_bits(folder, local, tmp_path, owner, name, count):
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(owner=owner, name=name, count=count))
    assert run(script, folder, tmp_path / "run", "--local") == -signal.SIGKILL
    assert run(ROOT / "recipes" / "iterative_dpo.py", folder, tmp_path / "run", "--local") == 0
    assert numbers(tmp_path / "run") == numbers(local)
    assert final(tmp_path / "run") == final(local)
    assert held_out(tmp_path / "run") == held_out(local)


@pytest.mark.slow
def test_a_round_waits_for_a_person_and_goes_on_with_the_lines_that_come_back(folder, tmp_path):
    def start(*more):
        command = [sys.executable, str(ROOT / "recipes" / "iterative_dpo.py"), *given, *more]
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, cwd=ROOT)

    labels, output = tmp_path / "labelled.jsonl", tmp_path / "run"
    more = ["--rounds.label_by", "person", "--rounds.labels", str(labels), "--ranking.num_to_label", "4"]
    given = flags(folder, output, "--local", "--run.num_steps", "4", "--rounds.evaluate_every", "0", *more)
    left: dict = {}
    for number in (0, 1):
        waiting = start()
        assert waiting.returncode == 0, waiting.stderr
        assert f"round {number} waits: 4 pairs in {output}/to_label.jsonl" in waiting.stdout
        assert not (output / "final").exists()
        asked = [json.loads(line) for line in (output / "to_label.jsonl").read_text().splitlines()]
        left = asked[0] if number == 0 else left
        with open(labels, "a") as file:
            file.writelines(json.dumps({**row, "ranks": [2, 1]}) + "\n" for row in asked[1:])
    tied = labels.read_text() + json.dumps(asked[0]) + "\n"
    (tmp_path / "tied.jsonl").write_text(tied)
    refused = start("--rounds.labels", str(tmp_path / "tied.jsonl"))
    assert refused.returncode == 2
    assert "tied.jsonl:7: 'ranks': got [1, 1], expected [1, 2] or [2, 1]" in refused.stderr
    with open(labels, "a") as file:  # of round 0, which was read without it
        file.write(json.dumps({**left, "ranks": [2, 1]}) + "\n")
    done = start()
    assert done.returncode == 0, done.stderr
    assert "left out, since it was not there when their round was read: 7" in done.stdout
    assert [row["round/pairs"] for row in numbers(output) if "round/pairs" in row] == [3.0, 3.0]
    assert (output / "summary.json").exists()


def test_what_cannot_be_is_refused_at_the_door(folder, tmp_path, capsys):
    more = ["--local", "--rounds.prompts_per_round", "21"]
    assert iterative_dpo.main(flags(folder, tmp_path / "run", *more)) == 2
    assert "rounds.prompts_per_round: got 21, expected at most the 20 training prompts" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_dry_run_counts_and_starts_nothing(folder, tmp_path, capsys):
    assert iterative_dpo.main(flags(folder, tmp_path / "run", "--local", "--dry-run")) == 0
    said = capsys.readouterr().out
    assert "3 rounds x 8 prompts x 4 samples = 96 answers" in said
    assert "3 rounds x 2 steps x 4 pairs, of which 25% from earlier rounds" in said
    assert not (tmp_path / "run").exists()

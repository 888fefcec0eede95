"""DPO and KTO recipes in one process and through Ray, with one rank and two, killed and taken up again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 280
NUM_STEPS = 5
COMMON = """
run: {{num_steps: {steps}, checkpoint_every: 1, trackers: []}}
model: {{path: {folder}/policy}}
training:
  batch_size: 6
  max_tokens_per_micro_batch: 384
  validate_every: 2
  adapter: {{r: {rank}}}
  optimizer: {{lr: 2.0e-3}}
evaluation:
  source: {{path: {folder}/questions.jsonl}}
  num_prompts: 3
  max_new_tokens: 4
  functions: [{{name: "text:finished_sentence"}}]
"""
RUNS = {
    "dpo": """
data:
  sources: [{{path: {folder}/pairs.jsonl, weight: 2}}, {{path: {folder}/more.jsonl, weight: 1}}]
  held_out: 4
  max_tokens: 96
dpo: {{terms: [{{kind: sigmoid}}, {{kind: sft, weight: 0.2}}], beta: 0.2}}
reference: {{sync_every: 2}}
""",
    "kto": """
data: {{sources: [{{path: {folder}/labels.jsonl}}, {{path: {folder}/pairs.jsonl}}], held_out: 6, max_tokens: 96}}
kto: {{balance: auto}}
""",
}
RUNS["bco"] = RUNS["kto"].replace("balance: auto", "loss: bco")
SCRIPTS = {"dpo": "dpo_medical.py", "kto": "kto_medical.py", "bco": "kto_medical.py"}
CLUSTERS = {
    "two ranks": "policy: {num_workers: 2, cpus_per_worker: 0.2}",
    "two ranks, FSDP2": "policy: {num_workers: 2, cpus_per_worker: 0.2, zero_stage: 2}",
    "two ranks, ZeRO-2": "policy: {num_workers: 2, cpus_per_worker: 0.2, engine: deepspeed, zero_stage: 2}",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preferences")
    write_tiny_model(folder / "policy")

    def write(name, rows):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    for name, count in (("pairs", 24), ("more", 12)):
        write(
            name,
            [
                {"prompt": f"{name} {i}?", "chosen": "Rest. " * (1 + i % 3), "rejected": "Run! " * (1 + i % 4)}
                for i in range(count)
            ],
        )
    good = [i % 4 > 0 for i in range(24)]
    write(
        "labels",
        [
            {"prompt": f"label {i}?", "response": f"{'Rest' if g else 'Run'} {i}.", "label": g}
            for i, g in enumerate(good)
        ],
    )
    write("questions", [{"prompt": f"Is {i} fine?"} for i in range(9)])
    for kind, own in RUNS.items():
        for rank in (0, 4):
            text = (COMMON + own).format(steps=NUM_STEPS, folder=folder, rank=rank)
            (folder / f"{kind}{rank}.yaml").write_text(text)
    for name, text in CLUSTERS.items():
        (folder / f"{name}.yaml").write_text(text + "\ncolocate: []\n")
    return folder


def command(folder: Path, output: Path, kind: str, rank: int, *flags: str) -> list[str]:
    given = ["--config", str(folder / f"{kind}{rank}.yaml"), "--output-dir", str(output)]
    return [sys.executable, str(ROOT / "recipes" / SCRIPTS[kind]), *given, *flags]


def run(folder: Path, output: Path, kind: str, rank: int, *flags: str) -> Path:
    own = {**os.environ, "RAYLIGN_CACHE": str(folder / "cache")}
    done = subprocess.run(
        command(folder, output, kind, rank, *flags),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        cwd=ROOT,
        env=own,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return output


def numbers(output: Path) -> list[dict[str, float]]:
    """The metrics of each step, times apart."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("timing/")} for row in rows]


def final(output: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(output / "final/model.safetensors").items()}


def held_out(output: Path) -> dict[str, dict]:
    return json.loads((output / "summary.json").read_text())["held_out"]


CASES = [("dpo", 4), ("dpo", 0), ("kto", 4), ("kto", 0), ("bco", 4)]


def cases(*quick: tuple[str, int]) -> pytest.MarkDecorator:
    """All of them as `alone`, the others than these in the slow set."""
    params = [
        pytest.param(
            case,
            marks=() if case in quick else pytest.mark.slow,
            id=f"{case[0]}, {'LoRA' if case[1] else 'full'}",
        )
        for case in CASES
    ]
    return pytest.mark.parametrize("alone", params, indirect=True)


@pytest.fixture(scope="module")
def alone(request, folder):
    """A run in one process."""
    kind, rank = request.param
    return kind, rank, run(folder, folder / f"alone {kind}{rank}", kind, rank, "--local")


@cases(("dpo", 4))
def test_through_ray_the_bits_are_those_of_one_process(folder, alone):
    kind, rank, local = alone
    on_ray = run(folder, folder / f"ray {kind}{rank}", kind, rank)
    assert numbers(on_ray) == numbers(local)
    assert final(on_ray) == final(local)
    assert held_out(on_ray) == held_out(local)
    table = held_out(local)
    figure = "implicit_accuracy" if kind == "dpo" else "implicit_auc"
    assert table[figure]["before"] == 0.5
    assert table[figure]["after"] > 0.5
    tasks = ("pairs.jsonl", "more.jsonl") if kind == "dpo" else ("pairs.jsonl", "labels.jsonl")
    assert {f"{figure}/{task}" for task in tasks} <= set(table)
    assert table["answers/text:finished_sentence"]["n"] == 3
    assert (local / "hygiene.txt").read_text().count("\n") > 5


@cases(("kto", 0))
@pytest.mark.parametrize(
    "cluster", ["two ranks", *(pytest.param(c, marks=pytest.mark.slow) for c in list(CLUSTERS)[1:])]
)
def test_two_ranks_by_the_yaml_alone_give_the_numbers_of_one(folder, alone, cluster):
    """KTO's baseline and its classes' rewards among them."""
    if "ZeRO" in cluster:
        pytest.importorskip("deepspeed")
    kind, rank, local = alone
    flags = ["--cluster", str(folder / f"{cluster}.yaml")]
    if "FSDP2" in cluster:  # whose workers hold parts of the model, and answer nothing
        flags += ["--evaluation.source", "null", "--evaluation.functions", "[]"]
    many = run(folder, folder / f"{cluster} {kind}{rank}", kind, rank, *flags)
    for ours, theirs in zip(numbers(many), numbers(local), strict=True):
        if "dpo/margin" in theirs and abs(theirs["dpo/margin"]) < 1e-6:
            # Policy and reference are the same: rounding decides on which side of 0 a gap is.
            ours["dpo/accuracy"] = theirs["dpo/accuracy"]
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


@cases()
def test_killed_and_started_again_it_ends_with_the_same_bits(folder, alone, tmp_path):
    kind, rank, local = alone
    output = tmp_path / "run"
    process = subprocess.Popen(command(folder, output, kind, rank, "--local"), cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + TIMEOUT
    while not (output / "checkpoints" / "step_000003" / "manifest.json").exists():
        assert process.poll() is None, "it ended before its third step was on disk"
        assert time.monotonic() < deadline
        os.sched_yield()
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(folder, output, kind, rank, "--local")
    assert numbers(output) == numbers(local)
    assert final(output) == final(local)
    assert held_out(output) == held_out(local)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 4], ids=["full", "LoRA"])
def test_numbers_on_disk_give_the_run_of_a_live_reference(folder, tmp_path, rank):
    """And a second run reads them."""
    settings = ["--local", "--reference.sync_every", "null"]
    live = run(folder, tmp_path / "live", "dpo", rank, *settings)
    cached = run(folder, tmp_path / "cached", "dpo", rank, *settings, "--reference.mode", "cached")
    files = {path: path.stat().st_mtime_ns for path in (folder / "cache" / "reference").iterdir()}
    again = run(folder, tmp_path / "again", "dpo", rank, *settings, "--reference.mode", "cached")
    assert {path: path.stat().st_mtime_ns for path in (folder / "cache" / "reference").iterdir()} == files
    assert final(again) == final(cached)
    for ours, theirs in zip(numbers(cached), numbers(live), strict=True):
        ours["dpo/accuracy"] = theirs["dpo/accuracy"] if theirs["step"] == 0 else ours["dpo/accuracy"]
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)

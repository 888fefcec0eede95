"""A supervised recipe in one process and through Ray, with one rank and more, killed and taken up again."""

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
RUN = """
run: {{num_steps: {steps}, checkpoint_every: 1}}
data: {{sources: [{{path: {folder}/rows.jsonl}}], held_out: 6, max_tokens: 96}}
model: {{path: {folder}/policy}}
training:
  batch_size: 6
  max_tokens_per_micro_batch: 192
  validate_every: 2
  neftune_alpha: 2.0
  adapter: {{r: {rank}}}
  optimizer: {{lr: 2.0e-3}}
"""
CLUSTERS = {
    "two ranks": "policy: {num_workers: 2, cpus_per_worker: 0.2}",
    "three ranks": "policy: {num_workers: 3, cpus_per_worker: 0.2}",
    "two ranks, ZeRO-2": "policy: {num_workers: 2, cpus_per_worker: 0.2, engine: deepspeed, zero_stage: 2}",
    "three ranks, ZeRO-2": "policy: {num_workers: 3, cpus_per_worker: 0.2, engine: deepspeed, zero_stage: 2}",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    write_tiny_model(folder / "policy")
    rows = [{"prompt": f"What about {i}?", "completion": "Rest. " * (1 + i % 5)} for i in range(30)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for rank in (0, 4):
        (folder / f"r{rank}.yaml").write_text(RUN.format(steps=NUM_STEPS, folder=folder, rank=rank))
    for name, text in CLUSTERS.items():
        (folder / f"{name}.yaml").write_text(text + "\ncolocate: []\n")
    return folder


def command(folder: Path, output: Path, rank: int, *flags: str) -> list[str]:
    given = ["--config", str(folder / f"r{rank}.yaml"), "--output-dir", str(output)]
    return [sys.executable, str(ROOT / "recipes" / "lora_sft_medical.py"), *given, *flags]


def run(folder: Path, output: Path, rank: int, *flags: str) -> Path:
    done = subprocess.run(
        command(folder, output, rank, *flags), capture_output=True, text=True, timeout=TIMEOUT, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return output


def numbers(output: Path) -> list[dict[str, float]]:
    """The metrics of each step, times apart."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("timing/")} for row in rows]


def final(output: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(output / "final/model.safetensors").items()}


@pytest.fixture(scope="module", params=[pytest.param(0, marks=pytest.mark.slow), 4], ids=["full", "LoRA"])
def alone(request, folder):
    """A run in one process."""
    return request.param, run(folder, folder / f"alone{request.param}", request.param, "--local")


def test_through_ray_the_bits_are_those_of_one_process(folder, alone):
    rank, local = alone
    on_ray = run(folder, folder / f"ray{rank}", rank)
    assert numbers(on_ray) == numbers(local)
    assert final(on_ray) == final(local)
    summary = json.loads((on_ray / "summary.json").read_text())
    loss = summary["held_out"]["loss"]
    assert loss["after"] < loss["before"]
    assert summary["parameters"]["trained"] < summary["parameters"]["all"] or not rank


@pytest.mark.parametrize(
    "cluster",
    ["two ranks", "three ranks, ZeRO-2", *(pytest.param(c, marks=pytest.mark.slow) for c in list(CLUSTERS)[1:3])],
)
def test_more_ranks_by_the_yaml_alone_give_the_losses_of_one(folder, alone, cluster):
    if "ZeRO" in cluster:
        pytest.importorskip("deepspeed")
    rank, local = alone
    output = folder / f"{cluster} {rank}"
    many = run(folder, output, rank, "--cluster", str(folder / f"{cluster}.yaml"))
    for ours, theirs in zip(numbers(many), numbers(local), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


def test_killed_and_started_again_it_ends_with_the_same_bits(folder, alone, tmp_path):
    rank, local = alone
    output = tmp_path / "run"
    process = subprocess.Popen(command(folder, output, rank, "--local"), cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + TIMEOUT
    while not (output / "checkpoints" / "step_000002" / "manifest.json").exists():
        assert process.poll() is None, "it ended before its second step was on disk"
        assert time.monotonic() < deadline
        os.sched_yield()
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(folder, output, rank, "--local")
    assert numbers(output) == numbers(local)
    assert final(output) == final(local)


def test_the_next_stage_takes_final_by_its_path(folder, alone, tmp_path):
    """Its first held-out loss is the last one of the stage before; and plain transformers loads the folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rank, local = alone
    after = json.loads((local / "summary.json").read_text())["held_out"]["loss"]["after"]
    later = run(folder, tmp_path / "later", rank, "--local", "--model.path", str(local / "final"))
    before = json.loads((later / "summary.json").read_text())["held_out"]["loss"]["before"]
    assert before == pytest.approx(after, rel=1e-5)
    model = AutoModelForCausalLM.from_pretrained(local / "final")
    assert AutoTokenizer.from_pretrained(local / "final").chat_template
    assert model.config.vocab_size > 0
    card = (local / "final" / "README.md").read_text()
    assert "sha256 of examples" in card
    assert "num_steps: 5" in card

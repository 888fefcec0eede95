"""A reward actor that is killed takes its processes with it, and the run that goes on ends with the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 300
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory) -> Path:
    """Rules alone: a gate, and a part with running statistics."""
    file = tmp_path_factory.mktemp("rules") / "ppo.yaml"
    file.write_text(
        f"""
run: {{num_steps: 16, trackers: []}}
data: {{source: {{path: {tiny}/prompts.jsonl}}, held_out: 2}}
model: {{path: {tiny}/policy}}
reward:
  functions:
    - {{name: "text:length_between", settings: {{min_words: 1, max_words: 5}}, gate: true, weight: 0.5}}
    - {{name: "text:no_repetition", part: fresh, normalize: true, clip: [-2.0, 2.0]}}
  execution: {{num_workers: 2, samples_per_call: 1}}
rollout: {{engine: transformers, max_new_tokens: 8}}
ppo: {{rollout_batch_size: 4, minibatch_size: 4}}
policy: {{adapter: {{r: 4}}, optimizer: {{lr: 1.0e-3}}}}
"""
    )
    return file


def command(config: Path, output: Path, *flags: str) -> list[str]:
    recipe = str(ROOT / "recipes" / "ppo_medical.py")
    return [sys.executable, recipe, "--config", str(config), "--output-dir", str(output), *flags]


def rows(output: Path) -> list[dict]:
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("timing/")} for row in found]


def test_a_killed_reward_actor_leaves_no_process_and_the_run_goes_on_from_its_last_step(config, tmp_path):
    output = tmp_path / "killed"
    driver = subprocess.Popen(command(config, output), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + TIMEOUT
    while not (output / "checkpoints" / "step_000002").is_dir():
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    family = {one: " ".join(one.cmdline()) for one in psutil.Process(driver.pid).children(recursive=True)}
    (actor,) = [one for one, line in family.items() if "ray::RewardModelActor" in line]
    workers = [one for one, line in family.items() if "rewards.worker" in line and one.ppid() == actor.pid]
    assert len(workers) == 2
    os.kill(actor.pid, signal.SIGKILL)
    assert not psutil.wait_procs([actor, *workers], timeout=60)[1]
    _, errors = driver.communicate(timeout=TIMEOUT)
    assert driver.returncode == 1, errors[-2000:]
    assert "ActorDiedError: reward_model actor, score: the actor's process died" in errors
    assert not (output / "final").exists()

    subprocess.run(command(config, output), cwd=ROOT, check=True, timeout=TIMEOUT, capture_output=True)
    subprocess.run(command(config, tmp_path / "whole", "--local"), cwd=ROOT, check=True, timeout=TIMEOUT)
    for name in ("final/model.safetensors", "checkpoints/step_000016/loop.json"):
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert rows(output) == rows(tmp_path / "whole")
    assert {"reward/fresh/mean", "reward/fresh/std", "reward/text:length_between/unscored_count"} <= set(
        rows(output)[0]
    )

"""The recipes with several workers for each role, by editing the cluster YAML alone: the weights of one worker."""

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
from safetensors.torch import load_file
from tiny import write_prompts, write_tiny_model, write_tiny_reward_model

TIMEOUT = 280
ROOT = Path(__file__).resolve().parents[2]
WORKERS = """
policy: {num_workers: 2}
reference: {num_workers: 2}
critic: {num_workers: 3, cpus_per_worker: 0.1}
reward_model: {num_workers: 2}
rollout: {engine: transformers, num_engines: 2, threads_per_worker: 1}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    write_tiny_model(folder / "policy")
    write_tiny_reward_model(folder / "reward")
    write_prompts(folder / "prompts.jsonl")
    (folder / "many.yaml").write_text(WORKERS)
    rows = [
        {"prompt": f"What about topic {i}?", "chosen": "Rest." * (1 + i % 4), "rejected": "No!"} for i in range(24)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(recipe: str, output: Path, config: Path, *flags: str) -> list[str]:
    given = ["--config", str(config), "--output-dir", str(output)]
    return [sys.executable, str(ROOT / "recipes" / recipe), *given, *flags]


def run(recipe: str, output: Path, config: Path, *flags: str) -> Path:
    done = subprocess.run(
        command(recipe, output, config, *flags), capture_output=True, text=True, timeout=TIMEOUT, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return output


def is_policy(process: psutil.Process) -> bool:
    """Ray names its workers after the roles that they host."""
    return "ray::PolicyActor" in " ".join(process.cmdline())


def weights(output: Path) -> dict:
    return load_file(str(output / "final" / "model.safetensors"))


def largest_difference(ours: dict, theirs: dict) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one_pass", "adapter"),
    [("false", "{}"), ("true", "{r: 4}")],
    ids=["two epochs, full", "one pass, LoRA"],
)
def test_ppo_with_several_workers_of_every_role(folder, tmp_path, one_pass, adapter):
    config = tmp_path / "ppo.yaml"
    update = "{rollout_batch_size: 6, minibatch_size: 6, one_pass: true}"
    if one_pass == "false":
        update = "{rollout_batch_size: 6, minibatch_size: 3, ppo_epochs: 2}"
    config.write_text(
        f"""
run: {{num_steps: 3}}
data: {{source: {{path: {folder}/prompts.jsonl}}, held_out: 4}}
model: {{path: {folder}/policy}}
reward: {{model: {folder}/reward, missing_eos_penalty: 0.5}}
rollout: {{engine: transformers, max_new_tokens: 8}}
policy: {{adapter: {adapter}, micro_batch_size: 2, optimizer: {{lr: 1.0e-3}}}}
critic: {{micro_batch_size: 2, optimizer: {{lr: 1.0e-3}}}}
ppo: {update}
"""
    )
    one = run("ppo_medical.py", tmp_path / "one", config, "--local")
    many = run("ppo_medical.py", tmp_path / "many", config, "--cluster", str(folder / "many.yaml"))
    start = load_file(str(folder / "policy" / "model.safetensors"))
    assert largest_difference(weights(one), start) > 1e-3
    assert largest_difference(weights(many), weights(one)) < 1e-4


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_run_and_another_number_of_ranks_goes_on(folder, tmp_path):
    config = tmp_path / "ppo.yaml"
    config.write_text(
        f"""
run: {{num_steps: 4}}
data: {{source: {{path: {folder}/prompts.jsonl}}, held_out: 4}}
model: {{path: {folder}/policy}}
reward: {{functions: [{{name: "text:no_repetition"}}], missing_eos_penalty: 0.5}}
rollout: {{engine: transformers, max_new_tokens: 8}}
policy: {{optimizer: {{lr: 1.0e-3}}}}
ppo: {{rollout_batch_size: 6, minibatch_size: 6}}
"""
    )
    cluster = tmp_path / "two.yaml"
    cluster.write_text("policy: {num_workers: 2}\nreference: {num_workers: 2}\n")
    one = run("ppo_medical.py", tmp_path / "one", config, "--local")
    output = tmp_path / "killed"
    driver = subprocess.Popen(
        command("ppo_medical.py", output, config, "--cluster", str(cluster), "--run.num_steps", "4"),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + TIMEOUT
    while not (output / "checkpoints" / "step_000001").is_dir():
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    second = max(p.pid for p in psutil.Process(driver.pid).children(recursive=True) if is_policy(p))
    os.kill(second, signal.SIGKILL)
    _, errors = driver.communicate(timeout=TIMEOUT)
    assert driver.returncode == 1, errors[-2000:]
    assert "--resume auto" in errors
    assert largest_difference(weights(run("ppo_medical.py", output, config, "--local")), weights(one)) < 1e-4


@pytest.mark.slow
def test_a_reward_model_with_three_ranks(folder, tmp_path):
    config = tmp_path / "reward_model.yaml"
    config.write_text(
        f"""
run: {{num_steps: 3, checkpoint_every: 3}}
data: {{source: {{path: {folder}/pairs.jsonl}}, held_out: 6}}
model: {{path: {folder}/policy}}
training: {{batch_size: 6, micro_batch_size: 1, optimizer: {{lr: 1.0e-3}}}}
"""
    )
    cluster = tmp_path / "three.yaml"
    cluster.write_text("reward_model: {num_workers: 3}\ncolocate: []\n")
    one = run("reward_model_medical.py", tmp_path / "one", config, "--local")
    three = run("reward_model_medical.py", tmp_path / "three", config, "--cluster", str(cluster))
    assert largest_difference(weights(three), weights(one)) < 1e-4

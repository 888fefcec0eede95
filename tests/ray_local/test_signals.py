"""A signal that comes while the driver waits for an actor ends the run, whatever the actor does; so does the death of
an actor that the run cannot do without. Nothing of the run is left then."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]

DRIVER = """
import os, sys, threading
from actors.worker import Actor
from alignment.config import RewardModelRunConfig
from recipes import common

class Stays(Actor):
    role = "reward_model"

    def setup(self, peers):
        pass

    def signal_and_stay(self, driver, number):
        os.kill(driver, number)
        threading.Event().wait()

def body(job):
    with job.groups({"reward_model": Stays()}) as groups:
        groups["reward_model"].call("reward_model", "signal_and_stay", os.getpid(), int(sys.argv[1])).result()

sys.exit(common.run_recipe("reward_model_medical", RewardModelRunConfig, body, ["--output-dir", sys.argv[2]]))
"""


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "inter")]
)
def test_a_signal_ends_a_wait(tmp_path, number, code, word):
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(int(number)), str(tmp_path / "run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stderr[-2000:]
    assert f"reward_model_medical: {word}" in done.stderr
    assert "no step is on disk yet" in done.stderr


MANY = """
policy: {num_workers: 2}
reference: {num_workers: 2}
critic: {num_workers: 1}
reward_model: {num_workers: 2}
rollout: {engine: transformers, num_engines: 2, max_engines: 3, threads_per_worker: 1}
"""
TWO = "colocate: [[policy, reference, reward_model, rollout]]"
TIMEOUT = 280


@contextlib.contextmanager
def running(machines: str, tiny: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen, dict]]:
    """A run after its first step: the driver, and every process below it with its command line."""
    (tmp_path / "cluster.yaml").write_text(machines)
    (tmp_path / "ppo.yaml").write_text(
        f"""
run: {{num_steps: 500}}
data: {{source: {{path: {tiny}/prompts.jsonl}}, held_out: 4}}
model: {{path: {tiny}/policy}}
reward: {{model: {tiny}/reward}}
rollout: {{engine: transformers, max_new_tokens: 8}}
ppo: {{rollout_batch_size: 4, minibatch_size: 4}}
"""
    )
    output = tmp_path / "run"
    files = ["--config", tmp_path / "ppo.yaml", "--cluster", tmp_path / "cluster.yaml", "--output-dir", output]
    driver = subprocess.Popen(
        [sys.executable, str(ROOT / "recipes" / "ppo_medical.py"), *map(str, files)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + TIMEOUT
        while not (output / "checkpoints" / "step_000001").is_dir():
            assert driver.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield driver, {p: " ".join(p.cmdline()) for p in psutil.Process(driver.pid).children(recursive=True)}
    finally:
        if driver.poll() is None:
            driver.terminate()


def named(processes: dict[psutil.Process, str], role: str) -> list[psutil.Process]:
    return [process for process, line in processes.items() if f"ray::{role}" in line]


def all_gone(processes: dict[psutil.Process, str]) -> bool:
    return not psutil.wait_procs(list(processes), timeout=60)[1]


@pytest.mark.slow
def test_an_interrupt_frees_every_actor(tiny, tmp_path):
    with running(MANY, tiny, tmp_path) as (driver, processes):
        count = {
            role: len(named(processes, role)) for role in ("PolicyActor", "CriticActor", "RewardModel", "Rollout")
        }
        assert count == {"PolicyActor": 2, "CriticActor": 1, "RewardModel": 2, "Rollout": 2}
        driver.send_signal(signal.SIGINT)
        _, errors = driver.communicate(timeout=TIMEOUT)
        assert driver.returncode == 130, errors[-2000:]
        assert re.search(r"ppo_medical: interrupted; step \d+ is on disk, continue with --resume auto", errors)
        assert all_gone(processes)


def test_a_dead_critic_ends_the_job_and_says_so(tiny, tmp_path):
    with running(TWO, tiny, tmp_path) as (driver, processes):
        (critic,) = named(processes, "CriticActor")
        os.kill(critic.pid, signal.SIGKILL)
        _, errors = driver.communicate(timeout=TIMEOUT)
        assert driver.returncode == 1, errors[-2000:]
        last = errors.strip().splitlines()[-1]
        assert re.match(r"ppo_medical: failed: ActorDiedError: critic actor, \w+: the actor's process died \(.", last)
        assert "run the same command again with --resume auto" in last
        assert re.search(r"\(in step \d+, (score|update)\)$", last)
        assert all_gone(processes)

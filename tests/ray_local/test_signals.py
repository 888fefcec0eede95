"""A signal that comes while the driver waits for an actor ends the run, whatever the actor does."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

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

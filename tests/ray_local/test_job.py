"""`ray job submit -- python recipes/ppo_medical.py` in the checkout, on a Ray that `make ray-up` started."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    """The environment of a user's shell after `make ray-up`."""
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:8265"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    if shutil.which("make") is None:
        pytest.skip("needs make")
    subprocess.run(["make", "ray-up"], cwd=ROOT, check=True, timeout=300, env=environment)
    yield environment
    subprocess.run(["make", "ray-down"], cwd=ROOT, check=True, timeout=120, env=environment)


def submit(environment, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["ray", "job", "submit", "--", "python", "recipes/ppo_medical.py", *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_a_job_succeeds_and_its_log_shows_steps(cluster, tiny, tmp_path):
    config = tmp_path / "job.yaml"
    config.write_text(
        f"""
run: {{num_steps: 2}}
data: {{source: {{path: {tiny}/prompts.jsonl}}, held_out: 4}}
model: {{path: {tiny}/policy}}
reward: {{model: {tiny}/reward}}
rollout: {{engine: transformers, max_new_tokens: 4}}
ppo: {{rollout_batch_size: 4, minibatch_size: 4}}
"""
    )
    done = submit(cluster, "--config", str(config), "--output-dir", str(tmp_path / "run"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "succeeded" in done.stdout + done.stderr
    assert "step 2/2" in done.stdout


def test_a_broken_config_fails_with_its_reason(cluster, tmp_path):
    done = submit(cluster, "--ppo.clip_ratio", "7", "--output-dir", str(tmp_path / "run"))
    assert done.returncode != 0
    assert "ppo.clip_ratio" in done.stdout + done.stderr
    assert "failed" in (done.stdout + done.stderr).lower()


def test_an_anonymous_request_is_turned_away(cluster):
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen("http://127.0.0.1:8265/api/jobs/", timeout=10)
    assert caught.value.code == 401

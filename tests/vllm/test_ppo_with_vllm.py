"""The PPO recipe with vLLM as its sampler, on real local Ray and in one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import write_prompts, write_tiny_model, write_tiny_reward_model

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

ROOT = Path(__file__).resolve().parents[2]
STEPS = 3


BESIDE = ("--local", "--cluster", str(ROOT / "cluster" / "one_process.yaml"))
"""Engine and policy in one process: the engine sleeps during the update."""


@pytest.mark.parametrize("flags", [(), BESIDE], ids=["ray", "one_process"])
@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_every_step_samples_from_the_weights_of_the_step_before(flags, rank, tmp_path):
    write_tiny_model(tmp_path / "policy", hidden_size=64, num_attention_heads=2)
    write_tiny_reward_model(tmp_path / "reward")
    write_prompts(tmp_path / "prompts.jsonl")
    (tmp_path / "ppo.yaml").write_text(
        f"""
run: {{num_steps: {STEPS}}}
data: {{source: {{path: {tmp_path}/prompts.jsonl}}, held_out: 4}}
model: {{path: {tmp_path}/policy}}
reward: {{model: {tmp_path}/reward}}
rollout: {{engine: vllm, max_new_tokens: 8, vllm: {{kv_cache_gb: 0.1, max_model_len: 256}}}}
ppo: {{rollout_batch_size: 4, minibatch_size: 4}}
policy: {{adapter: {{r: {rank}}}, optimizer: {{lr: 1.0e-2}}}}
"""
    )
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "recipes" / "ppo_medical.py"),
            *("--config", str(tmp_path / "ppo.yaml"), "--output-dir", str(tmp_path / "run"), *flags),
        ],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(STEPS))
    # Weights of an older version would show: the rate is large enough that one step moves log-probabilities by 0.01.
    assert all(row["rollout/logprob_gap"] < 1e-4 for row in rows)
    assert rows[-1]["kl/per_token_k3"] > 1e-3
    samples = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert {(s["step"], s["weight_version"]) for s in samples} == {(step, step) for step in range(STEPS)}

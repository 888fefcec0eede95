"""A policy's answers ranked through Ray actors: the rows of a run in one process, byte for byte."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import write_tiny_reward_model

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
data: {{source: {{path: {tiny}/prompts.jsonl}}, held_out: 4}}
model: {{path: {tiny}/policy}}
reward:
  model: {tiny}/reward
  ensemble: {{models: [{folder}/second]}}
  functions: [{{name: "text:no_repetition", weight: 0.5}}]
  missing_eos_penalty: 0.25
rollout: {{engine: transformers, max_new_tokens: 12}}
ranking: {{num_samples_per_prompt: 3, batch_size: 8, on_cut: keep, label_threshold: 0.0}}
"""


@pytest.mark.slow
def test_two_engines_leave_the_rows_of_one_process(tiny, tmp_path):
    write_tiny_reward_model(tmp_path / "second", seed=2)
    (tmp_path / "rank.yaml").write_text(CONFIG.format(tiny=tiny, folder=tmp_path))
    (tmp_path / "cluster.yaml").write_text(
        "colocate: []\nreward_model: {cpus_per_worker: 0.2, threads_per_worker: 1}\n"
        "rollout: {num_engines: 2, cpus_per_worker: 0.2, threads_per_worker: 1}\n"
    )
    runs = {
        "local": ["--local"],
        "ray": ["--cluster", str(tmp_path / "cluster.yaml")],
    }
    for name, more in runs.items():
        given = ["--config", str(tmp_path / "rank.yaml"), "--output-dir", str(tmp_path / name), *more]
        command = [sys.executable, str(ROOT / "recipes" / "rank_answers.py"), *given]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-3000:]
    for name in ("answers.jsonl", "pairs.jsonl", "labels.jsonl"):
        local, ray = ((tmp_path / run / "final" / name).read_bytes() for run in runs)
        assert local == ray
        assert local
    answers = [json.loads(line) for line in (tmp_path / "ray" / "final" / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 60
    for one in answers:
        expected = one["parts"]["reward_model"] + 0.5 * one["parts"]["text:no_repetition"]
        assert abs(one["score"] - (expected if one["finished"] else expected - 0.25)) < 1e-9
        assert one["disagreement"] > 0

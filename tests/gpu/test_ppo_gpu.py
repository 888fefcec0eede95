"""The recipe on one GPU in bfloat16. Skipped where there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("flags", [(), ("--local",)])
def test_ppo_runs_in_bfloat16_on_one_gpu(tiny, tmp_path, flags):
    config = tmp_path / "gpu.yaml"
    config.write_text(
        f"""
run: {{num_steps: 3}}
data: {{source: {{path: {tiny}/prompts.jsonl}}, held_out: 4}}
model: {{path: {tiny}/policy, dtype: bfloat16}}
reward: {{model: {tiny}/reward}}
rollout: {{max_new_tokens: 8}}
ppo: {{rollout_batch_size: 4, minibatch_size: 4}}
"""
    )
    subprocess.run(
        [
            sys.executable,
            str(ROOT / "recipes" / "ppo_medical.py"),
            *("--config", str(config), "--cluster", str(ROOT / "cluster" / "one_gpu.yaml")),
            *("--output-dir", str(tmp_path / "run"), *flags),
        ],
        check=True,
        timeout=300,
        cwd=ROOT,
    )
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert rows[0]["rollout/logprob_gap"] < 0.05
    assert all(row["ppo/skipped_count"] == 0 for row in rows)

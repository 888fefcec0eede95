"""Supervised recipes on one GPU in bfloat16, QLoRA among them. Skipped where there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("flags", [(), ("--local",)])
def test_qlora_with_the_fastest_attention_there_is(tiny, tmp_path, flags, quantization):
    rows = [{"prompt": f"What about {i}?", "completion": "Rest. " * (1 + i % 5)} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tmp_path / "gpu.yaml"
    config.write_text(
        f"""
run: {{num_steps: 6}}
data: {{sources: [{{path: {tmp_path}/rows.jsonl}}], held_out: 6, max_tokens: 96}}
model: {{path: {tiny}/policy, dtype: bfloat16}}
training:
  adapter: {{r: 8, quantization: {quantization}}}
  batch_size: 8
  optimizer: {{lr: 5.0e-3}}
"""
    )
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "recipes" / "qlora_flash.py"),
            *("--config", str(config), "--cluster", str(ROOT / "cluster" / "one_gpu.yaml")),
            *("--output-dir", str(tmp_path / "run"), *flags),
        ],
        check=True,
        timeout=300,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "attention: " in done.stdout
    loss = json.loads((tmp_path / "run" / "summary.json").read_text())["held_out"]["loss"]
    assert loss["after"] < loss["before"]


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_attention_implementations_agree(tiny, attention):
    """bfloat16 log-probabilities of packed rows against eager attention, each sequence alone."""
    from alignment.batching import sequence_batch
    from alignment.forward import response_logprobs
    from alignment.models import load_causal_lm

    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
    settings = {"dtype": torch.bfloat16, "device": "cuda"}
    fast = load_causal_lm(str(tiny / "policy"), attention=attention, layout="packed", **settings)
    slow = load_causal_lm(str(tiny / "policy"), attention="eager", **settings)
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(3, 200, (n,), generator=generator).tolist() for n in (9, 60, 23, 31)]
    ids, mask = sequence_batch(sequences, "cuda")
    with torch.no_grad():
        together, _ = response_logprobs(fast, ids, mask, mask, temperature=1.0)
        for row, sequence in enumerate(sequences):
            one, own = sequence_batch([sequence], "cuda")
            alone, _ = response_logprobs(slow, one, own, own, temperature=1.0)
            gap = (together[row, : len(sequence)] - alone[0]).abs()
            assert float(gap.mean()) < 0.05

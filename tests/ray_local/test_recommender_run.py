"""The recommender's recipes through Ray: the numbers of one process, choices and all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_films import write_recommender

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 280


def run(recipe: str, config: Path, output: Path, cache: Path, *flags: str) -> Path:
    command = [sys.executable, str(ROOT / "recipes" / recipe), "--config", str(config), "--output-dir", str(output)]
    done = subprocess.run(
        [*command, *flags],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        cwd=ROOT,
        env={**os.environ, "RAYLIGN_CACHE": str(cache)},
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return output


def told(output: Path) -> tuple[list[dict], dict, dict, bytes]:
    """Metrics without times, both tables, every score, and the weights."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in row.items() if not k.startswith("timing/")} for row in rows]
    summary = json.loads((output / "summary.json").read_text())
    tables = {part: summary[part] for part in ("held_out", "films")}
    weights = b"".join(t.numpy().tobytes() for _, t in sorted(load_file(output / "final/model.safetensors").items()))
    return metrics, tables, json.loads((output / "films.json").read_text()), weights


@pytest.mark.slow
def test_through_ray_the_bits_are_those_of_one_process(tiny, tmp_path):
    """Each with a cache of its own, so that the base is asked through Ray too."""
    folder = write_recommender(tmp_path, tiny / "policy")
    early, live = ("dpo_recommender_early.py", folder / "early.yaml"), ("live_recommender.py", folder / "live.yaml")
    local = run(*early, folder / "early", tmp_path / "local cache", "--local")
    on_ray = run(*early, tmp_path / "early on ray", tmp_path / "ray cache")
    assert told(on_ray) == told(local)
    steps = ["--run.num_steps", "3"]
    local = run(*live, tmp_path / "live", tmp_path / "local cache", "--local", *steps)
    on_ray = run(*live, tmp_path / "live on ray", tmp_path / "third cache", *steps)
    assert told(on_ray) == told(local)

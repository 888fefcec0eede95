"""A run that is started again goes on from its last good step, and each step stands in its files once."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from recipes import ppo_medical


@pytest.fixture(autouse=True, scope="module")
def _same_umask_afterwards():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("restarts") / "ppo.yaml"
    file.write_text(
        f"""
run: {{num_steps: 4, trackers: []}}
data: {{source: {{path: {tiny}/prompts.jsonl}}, held_out: 4}}
model: {{path: {tiny}/policy}}
reward: {{model: {tiny}/reward}}
rollout: {{engine: transformers, max_new_tokens: 8}}
kl: {{coef: 0.1, target: 0.5, horizon: 100}}
ppo: {{rollout_batch_size: 4, minibatch_size: 2, ppo_epochs: 2}}
policy: {{adapter: {{r: 4}}, optimizer: {{lr: 3.0e-3}}}}
"""
    )
    return file


def start(config: Path, output: Path, *flags: str) -> int:
    return ppo_medical.main(["--local", "--config", str(config), "--output-dir", str(output), *flags])


@pytest.fixture(scope="module")
def uninterrupted(config) -> Path:
    output = config.parent / "uninterrupted"
    assert start(config, output) == 0
    return output


def rows(file: Path) -> list[dict]:
    found = [json.loads(line) for line in file.read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("timing/")} for row in found]


def copied(output: Path, name: str) -> Path:
    """What the next process finds: this one holds the lock of the directory until it ends."""
    return shutil.copytree(output, output.with_name(name))


@pytest.mark.parametrize("every", [1, 4])
def test_a_run_that_its_kl_stopped_stops_there_again(config, uninterrupted, tmp_path, capsys, every):
    """With a checkpoint of every step the second start repeats the last one only; without any it repeats all."""
    whole = rows(uninterrupted / "metrics.jsonl")
    kl = [row["kl/per_sequence"] for row in whole]
    limit = max(kl) * 0.999
    last = next(step for step, value in enumerate(kl) if value > limit)
    assert limit > 0
    assert last > 0
    flags = ["--kl.limit", str(limit), "--run.checkpoint_every", str(every)]
    first = tmp_path / "first"
    for output in (first, tmp_path / "second"):
        if output != first:
            copied(first, output.name)
        assert start(config, output, *flags) == 1
        assert f"step {last}: got a KL of" in capsys.readouterr().err
        # The numbers of the run without a limit, up to and with the step that went too far.
        assert rows(output / "metrics.jsonl") == whole[: last + 1]
        assert rows(output / "rollouts.jsonl") == rows(uninterrupted / "rollouts.jsonl")[: 4 * (last + 1)]
        committed = [folder.name for folder in (output / "checkpoints").glob("step_*")]
        assert max(committed, default=None) == (f"step_{last:06d}" if every == 1 else None)


def test_going_on_from_a_named_step_ends_the_same(config, uninterrupted):
    output = copied(uninterrupted, "named")
    shutil.rmtree(output / "final")
    named = output / "checkpoints" / "step_000003"
    assert start(config, output, "--resume", str(named)) == 0
    for name in ("final/model.safetensors", "checkpoints/step_000004/policy/adapter_model.safetensors"):
        assert (output / name).read_bytes() == (uninterrupted / name).read_bytes()
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert rows(output / name) == rows(uninterrupted / name)


def test_a_checkpoint_of_another_run_is_refused_before_anything_changes(config, uninterrupted, capsys):
    output, other = copied(uninterrupted, "own"), copied(uninterrupted, "other")
    before = sorted(path.relative_to(output) for path in output.rglob("*"))
    assert start(config, output, "--resume", str(other / "checkpoints" / "step_000003")) == 2
    assert "a checkpoint of another run" in capsys.readouterr().err
    assert sorted(path.relative_to(output) for path in output.rglob("*")) == before

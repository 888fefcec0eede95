"""PPO trains first what its models come from when that is missing or half there, and passes on how that ended."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from alignment.config import PpoRunConfig
from alignment.fingerprint import model_fingerprint
from recipes import checks, common, ppo_medical, reward_model_medical, sft_calculators


@pytest.fixture(autouse=True)
def _same_umask_afterwards():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def flags(tiny, tmp_path, monkeypatch) -> list[str]:
    """A PPO run of one step whose reward model is `tmp_path/reward_model_medical/final`, away from any index."""
    config = tmp_path / "ppo.yaml"
    config.write_text(
        f"""
run: {{num_steps: 1}}
data: {{source: {{path: {tiny}/prompts.jsonl}}, held_out: 4}}
model: {{path: {tiny}/policy}}
reward: {{model: {tmp_path}/reward_model_medical/final}}
rollout: {{engine: transformers, max_new_tokens: 4}}
ppo: {{rollout_batch_size: 4, minibatch_size: 4}}
"""
    )
    monkeypatch.setenv("RAYLIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return ["--local", "--config", str(config), "--output-dir", str(tmp_path / "run")]


@pytest.fixture
def reward_config(tiny, tmp_path) -> Path:
    pairs = [{"prompt": f"What about topic {i}?", "chosen": "Rest.", "rejected": "No idea!"} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    config = tmp_path / "reward_model.yaml"
    config.write_text(
        f"""
run: {{num_steps: 2, checkpoint_every: 2}}
data: {{source: {{path: {tmp_path}/pairs.jsonl}}, held_out: 4}}
model: {{path: {tiny}/policy}}
training: {{batch_size: 4}}
"""
    )
    return config


def saved_reward_model(tiny: Path, tmp_path: Path) -> Path:
    """As the reward-model recipe leaves it: the statistics are the last file it writes."""
    folder = tmp_path / "reward_model_medical" / "final"
    shutil.copytree(tiny / "reward", folder)
    (folder / "score_statistics.json").write_text('{"mean": 0.5, "std": 2.0, "count": 8}')
    return folder


def test_a_complete_reward_model_is_used_as_it_is(tiny, tmp_path, flags, capsys):
    saved_reward_model(tiny, tmp_path)
    assert ppo_medical.main(flags) == 0
    assert "training it first" not in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "reward_model_medical").iterdir()] == ["final"]


@pytest.mark.parametrize("state", ["half-written", "missing"])
def test_else_it_is_trained_and_a_refusal_of_that_is_a_refusal(tiny, tmp_path, flags, capsys, state):
    """What the reward model is trained on cannot be fetched here: a refusal, two, and no traceback."""
    folder = saved_reward_model(tiny, tmp_path)
    if state == "missing":
        shutil.rmtree(folder)
    else:
        (folder / "score_statistics.json").unlink()
    assert ppo_medical.main(flags) == 2
    said = capsys.readouterr().err
    assert "training it first" not in said
    assert not (tmp_path / "run").exists(), "refused before anything of this run is on disk"
    assert "reward_model_medical: refused: asset" in said
    assert "ppo_medical: refused" in said
    assert "Traceback" not in said


def test_a_half_written_reward_model_is_finished_with_the_same_numbers(tmp_path, reward_config):
    whole, cut = tmp_path / "whole" / "reward_model_medical", tmp_path / "cut" / "reward_model_medical"
    flags = ["--local", "--config", str(reward_config), "--output-dir"]
    assert reward_model_medical.main([*flags, str(whole)]) == 0
    shutil.copytree(whole, cut)
    (cut / "final" / "score_statistics.json").unlink()
    (cut / "final" / "model.safetensors").write_bytes(b"half")
    assert reward_model_medical.main([*flags, str(cut)]) == 0
    for name in ("score_statistics.json", "model.safetensors"):
        assert (cut / "final" / name).read_bytes() == (whole / "final" / name).read_bytes()


def test_the_reward_model_trained_first_is_the_one_that_scores(tmp_path, flags, reward_config, monkeypatch, capsys):
    """The recipe itself, with a config whose data is here."""
    train = reward_model_medical.main
    monkeypatch.setattr(reward_model_medical, "main", lambda given: train([*given, "--config", str(reward_config)]))
    final = tmp_path / "reward_model_medical" / "final"
    assert ppo_medical.main([*flags, "--dry-run"]) == 0
    assert not final.parent.exists(), "a dry run trains nothing"
    assert "it would be trained first" in capsys.readouterr().out
    assert ppo_medical.main(flags) == 0
    assert (final / "score_statistics.json").is_file()
    assert "training it first" in capsys.readouterr().err
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


def test_the_policy_trained_first_is_the_one_that_learns(tiny, tmp_path, flags, monkeypatch, capsys):
    """The stand-in is the tiny model, and so are the lessons: what the real ones begin with is not here."""
    saved_reward_model(tiny, tmp_path)
    lessons = tmp_path / "lessons.jsonl"
    rows = [{"prompt": f"What is {i}?", "completion": "It is."} for i in range(9)]
    lessons.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--model.path", str(tiny / "policy"), "--data.sources", f"[{{path: {lessons}}}]", "--data.held_out", "2"]
    train = sft_calculators.main
    monkeypatch.setattr(sft_calculators, "main", lambda own: train([*own, *given, "--run.num_steps", "2"]))
    monkeypatch.setattr(checks, "_base_of", lambda recipe: str(tiny / "policy"))
    final = tmp_path / "sft_calculators" / "final"
    flags = [*flags, "--model.path", str(final)]
    assert ppo_medical.main([*flags, "--dry-run"]) == 0
    assert not final.parent.exists()
    assert f"{final} is not there yet: it would be trained first" in capsys.readouterr().out
    assert ppo_medical.main(flags) == 0
    assert (final / "model.safetensors").read_bytes() != (tiny / "policy" / "model.safetensors").read_bytes()
    inputs = json.loads((tmp_path / "run" / "inputs.json").read_text())
    assert inputs["model"] == model_fingerprint(str(final))


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_what_the_upstream_recipe_refuses_is_refused_at_the_door(
    tmp_path, flags, reward_config, monkeypatch, capsys, more
):
    """No run directory, no plan, no actor."""
    train = reward_model_medical.main
    wrong = ["--config", str(reward_config), "--data.held_out", "1000"]
    monkeypatch.setattr(reward_model_medical, "main", lambda given: train([*given, *wrong]))
    assert ppo_medical.main([*flags, *more]) == 2
    said = capsys.readouterr()
    assert "reward_model_medical: refused" in said.err
    assert "ppo_medical: refused" in said.err
    assert said.out == ""
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "reward_model_medical").exists()


def test_a_reward_model_that_gives_every_answer_one_score_is_not_trained_against(tiny, tmp_path, flags, capsys):
    folder = saved_reward_model(tiny, tmp_path)
    (folder / "score_statistics.json").write_text('{"mean": 0.5, "std": 0.0, "count": 8}')
    assert ppo_medical.main(flags) == 2
    assert "score_statistics.json: got mean 0.5 and std 0, expected" in capsys.readouterr().err


@pytest.mark.parametrize(("batch_size", "code"), [("4", 0), ("0", 2)])
def test_the_upstream_exit_code_is_the_code_of_the_run(tmp_path, flags, reward_config, batch_size, code):
    """The same with an upstream recipe that can be trained here."""

    def upstream(given: list[str]) -> int:
        return reward_model_medical.main([*given, "--config", str(reward_config), "--training.batch_size", batch_size])

    def body(job: common.Job[PpoRunConfig]) -> None:
        common.train_first(job, upstream, tmp_path / "reward_model_medical")

    assert common.run_recipe("ppo_medical", PpoRunConfig, body, flags) == code
    assert (tmp_path / "reward_model_medical" / "final" / "score_statistics.json").exists() == (code == 0)

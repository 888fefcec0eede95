"""What recipes must go on doing: models by revision from the hub's cache, no held-out pairs, a script of one's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import write_tiny_model, write_tiny_reward_model

from alignment.types import Prompt, Rollout, Score
from recipes.custom_rollout import answer, line

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, output: Path, *flags: str, **env: str) -> dict:
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / script), "--local", "--output-dir", str(output), *flags],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env={**os.environ, **env},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((output / "summary.json").read_text())


def test_every_load_of_a_model_takes_its_own_revision(tiny, tmp_path):
    """Three repositories, each cached under one commit to which no branch points: any other revision is not there."""
    commits = {"policy": "a" * 40, "critic": "b" * 40, "judge": "c" * 40}
    hub = tmp_path / "home" / "hub"
    for name, commit in commits.items():
        write = write_tiny_reward_model if name == "judge" else write_tiny_model
        write(hub / f"models--owner--{name}" / "snapshots" / commit)
    (tmp_path / "ppo.yaml").write_text(
        f"""
run: {{num_steps: 1}}
data: {{source: {{path: {tiny}/prompts.jsonl}}, held_out: 2}}
model: {{path: owner/policy, revision: {commits["policy"]}}}
critic: {{path: owner/critic, revision: {commits["critic"]}}}
reward: {{model: owner/judge, revision: {commits["judge"]}}}
rollout: {{engine: transformers, max_new_tokens: 4}}
ppo: {{rollout_batch_size: 4, minibatch_size: 4}}
"""
    )
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    summary = run("ppo_medical.py", tmp_path / "run", "--config", str(tmp_path / "ppo.yaml"), **home)
    assert summary["held_out"]["score"]["n"] == 2
    assert (tmp_path / "run" / "final" / "tokenizer.json").is_file()


def test_a_gold_rule_is_in_the_table_the_summary_and_the_report(tiny, tmp_path):
    (tmp_path / "ppo.yaml").write_text(
        f"""
run: {{num_steps: 3}}
data: {{source: {{path: {tiny}/prompts.jsonl}}, held_out: 2}}
model: {{path: {tiny}/policy}}
reward:
  functions: [{{name: "text:no_repetition", clip: [2.0, 3.0]}}]
  gold: [{{name: "text:question_words"}}]
rollout: {{engine: transformers, max_new_tokens: 4}}
ppo: {{rollout_batch_size: 4, minibatch_size: 4}}
hacking: {{window: 3}}
"""
    )
    summary = run("ppo_medical.py", tmp_path / "run", "--config", str(tmp_path / "ppo.yaml"))
    assert summary["held_out"]["gold/text:question_words"]["n"] == 2
    assert summary["hacking"]["clipped"] == {"holds": True, "began": [2]}
    assert summary["hacking"]["parted"] == {"holds": False, "began": []}
    table = (tmp_path / "run" / "hacking.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| 0", "| 1", "| 2"]
    assert (tmp_path / "run" / "hacking.svg").read_text().startswith("<svg")


def test_a_reward_model_without_held_out_pairs(tiny, tmp_path):
    rows = [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(6)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rm.yaml").write_text(
        f"""
run: {{num_steps: 2}}
data: {{source: {{path: {tmp_path}/pairs.jsonl}}, held_out: 0}}
model: {{path: {tiny}/policy}}
training: {{batch_size: 2}}
"""
    )
    summary = run("reward_model_medical.py", tmp_path / "run", "--config", str(tmp_path / "rm.yaml"))
    assert summary["held_out"] == {}
    saved = json.loads((tmp_path / "run" / "final" / "score_statistics.json").read_text())
    assert saved["count"] == 12, "both answers of the six training pairs set the scale"
    assert saved["std"] > 0


def test_a_dry_run_says_that_the_reward_model_would_be_trained_first(tiny, tmp_path):
    untrained = tmp_path / "reward_model_medical" / "final"
    (tmp_path / "ppo.yaml").write_text(
        f"""
data: {{source: {{path: {tiny}/prompts.jsonl}}, held_out: 2}}
model: {{path: {tiny}/policy}}
reward: {{model: {untrained}}}
ppo: {{rollout_batch_size: 4, minibatch_size: 4}}
"""
    )
    command = [sys.executable, str(ROOT / "recipes" / "ppo_medical.py"), "--config", str(tmp_path / "ppo.yaml")]
    done = subprocess.run(
        [*command, "--output-dir", str(tmp_path / "o"), "--dry-run"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert f"{untrained} is not there yet: it would be trained first" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ppo.yaml"]


@pytest.fixture(scope="module")
def ray():
    import ray

    from actors.launch import session

    with session():
        yield ray


def free_cpus(ray) -> float:
    """CPUs that nothing holds, once what was killed has let go."""
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU", 0.0) < ray.cluster_resources()["CPU"]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return ray.available_resources().get("CPU", 0.0)


@pytest.fixture
def model(tmp_path) -> str:
    """With heads that vLLM's CPU attention has a kernel for: the script samples with it where it is installed."""
    return str(write_tiny_model(tmp_path / "model", hidden_size=64, num_attention_heads=2))


def test_a_script_of_ones_own_answers_scores_and_lets_go(ray, model):
    pairs = answer(model)
    assert [rollout.sample_index for rollout, _ in pairs] == [0, 1, 0, 1]
    assert all(score.total is not None for _, score in pairs)
    assert free_cpus(ray) == ray.cluster_resources()["CPU"]


def test_a_script_of_ones_own_lets_go_when_it_fails(ray, model):
    with pytest.raises(Exception, match="finished_sentence"):
        answer(model, rule="text:finished_sentense")
    assert free_cpus(ray) == ray.cluster_resources()["CPU"]


@pytest.mark.parametrize(("total", "shown"), [(None, "unscored  Why?  'So.'"), (0.5, "   +0.50  Why?  'So.'")])
def test_an_answer_without_a_score_is_shown(total, shown):
    prompt = Prompt(id="0", messages=({"role": "user", "content": "Why?"},), prompt_ids=(1,), columns={})
    rollout = Rollout(
        prompt=prompt,
        sample_index=0,
        response_ids=(1,),
        rollout_logprobs=(0.0,),
        finish_reason="stop",
        response="So.",
        weight_version=0,
    )
    assert line(rollout, Score(total=total, parts={})) == shown

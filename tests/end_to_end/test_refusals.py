"""Bad input ends with exit 2, says got / expected / remedy, and starts no actor.

The promise is 10 seconds on a free machine, measured where Python itself starts (`started`); the tests allow three
times that, since a loaded one is no fault of the recipes. Elsewhere the imports are done beforehand. Faults that one
check finds in every recipe are tested without a process of their own, in tests/unit.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import byte_tokenizer, write_tiny_model
from warm import run_script

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 10


@pytest.fixture(scope="module")
def ppo(tiny):
    (tiny / "refuse.yaml").write_text(
        f"""
run: {{num_steps: 2}}
data: {{source: {{path: {tiny}/prompts.jsonl}}, held_out: 4}}
model: {{path: {tiny}/policy}}
reward: {{model: {tiny}/reward}}
rollout: {{engine: transformers, max_new_tokens: 4}}
ppo: {{rollout_batch_size: 4, minibatch_size: 4}}
"""
    )
    return tiny


def recipe_command(ppo: Path, output: Path, *flags: str, script: str = "ppo_medical.py") -> list[str]:
    given = ["--config", str(ppo / "refuse.yaml"), "--output-dir", str(output)]
    return [sys.executable, str(ROOT / "recipes" / script), *given, *flags]


def started(command: list[str], *, timeout: float, env=None) -> subprocess.CompletedProcess[str]:
    """As a user starts it."""
    began = time.monotonic()
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env={**os.environ, **(env or {})}
    )
    assert time.monotonic() - began < 3 * LIMIT_SECONDS
    return done


def refused(ppo: Path, output: Path, *flags: str, script: str = "ppo_medical.py", env=None, run=run_script) -> str:
    """Run the recipe through Ray, and return what it said."""
    done = run(recipe_command(ppo, output, *flags, script=script), timeout=60, env=env)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert "got" in done.stderr
    assert "expected" in done.stderr
    assert "Actor" not in done.stdout + done.stderr
    return done.stderr


def test_unknown_key_names_the_nearest(ppo, tmp_path):
    assert "ppo.clip_ratio" in refused(ppo, tmp_path / "o", "--ppo.clip_ration", "0.1", run=started)


def test_out_of_range_value(ppo, tmp_path):
    assert "ppo.clip_ratio" in refused(ppo, tmp_path / "o", "--ppo.clip_ratio", "1.5")


def test_top_p_while_training(ppo, tmp_path):
    assert "support" in refused(ppo, tmp_path / "o", "--rollout.top_p", "0.9")


def test_minibatch_that_does_not_divide(ppo, tmp_path):
    assert "ppo.minibatch_size: got 3" in refused(ppo, tmp_path / "o", "--ppo.minibatch_size", "3")


def test_missing_file(ppo, tmp_path):
    assert "nowhere.jsonl" in refused(ppo, tmp_path / "o", "--data.source.path", str(tmp_path / "nowhere.jsonl"))


def test_broken_row_is_named_by_line(ppo, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"question": "fine"}\n{"question": "broken\n')
    assert f"{file}:2" in refused(ppo, tmp_path / "o", "--data.source.path", str(file))


def test_empty_data_set(ppo, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    refused(ppo, tmp_path / "o", "--data.source.path", str(tmp_path / "empty.jsonl"))


def test_fewer_prompts_than_a_step_needs(ppo, tmp_path):
    file = tmp_path / "few.jsonl"
    file.write_text("".join(json.dumps({"question": f"q{i}"}) + "\n" for i in range(6)))
    assert "rollout_batch_size" in refused(ppo, tmp_path / "o", "--data.source.path", str(file))


def test_prompt_longer_than_the_limit(ppo, tmp_path):
    assert "prompts.jsonl:1" in refused(ppo, tmp_path / "o", "--data.max_prompt_tokens", "5")


def test_missing_column(ppo, tmp_path):
    assert "question" in refused(ppo, tmp_path / "o", "--data.prompt_key", "questoin")


def test_tokenizer_without_chat_template(ppo, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(ppo / "policy", folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    assert "chat template" in refused(ppo, tmp_path / "o", "--model.path", str(folder))


def test_vocabulary_mismatch(ppo, tmp_path):
    folder = write_tiny_model(tmp_path / "small")
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] = 100
    (folder / "config.json").write_text(json.dumps(config))
    assert "100 embedding rows" in refused(ppo, tmp_path / "o", "--model.path", str(folder))


def test_reward_model_without_a_head(ppo, tmp_path):
    assert "score" in refused(ppo, tmp_path / "o", "--reward.model", str(ppo / "policy"))


def test_reward_model_that_is_not_there(ppo, tmp_path):
    assert "missing-folder" in refused(ppo, tmp_path / "o", "--reward.model", str(tmp_path / "missing-folder"))


def test_model_that_is_not_there(ppo, tmp_path):
    assert "missing-folder" in refused(ppo, tmp_path / "o", "--model.path", str(tmp_path / "missing-folder"))


def test_unknown_reward_function(ppo, tmp_path):
    functions = '[{"name": "text:finished_sentense", "weight": 1.0}]'
    assert "finished_sentence" in refused(ppo, tmp_path / "o", "--reward.functions", functions)


def test_gpu_asked_and_none_there(ppo, tmp_path):
    text = refused(
        ppo, tmp_path / "o", "--cluster", str(ROOT / "cluster" / "one_gpu.yaml"), env={"CUDA_VISIBLE_DEVICES": ""}
    )
    assert "GPU" in text


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_more_cpus_than_the_machine_has(ppo, tmp_path, flags):
    cluster = tmp_path / "huge.yaml"
    cluster.write_text("policy: {cpus_per_worker: 4096}\n")
    text = refused(ppo, tmp_path / "o", "--cluster", str(cluster), *flags)
    assert "asked 4096" in text
    assert "have" in text
    assert not (tmp_path / "o").exists()


def test_more_cpus_than_a_cluster_has(ppo, tmp_path):
    """Only Ray knows the machines of a cluster that RAY_ADDRESS names: a private one stands for it."""
    cluster = tmp_path / "huge.yaml"
    cluster.write_text("policy: {cpus_per_worker: 4096}\nplacement_timeout: 1\n")
    done = subprocess.run(
        recipe_command(ppo, tmp_path / "o", "--cluster", str(cluster)),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": "local"},
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "asked 4096" in done.stderr


def test_an_engine_that_cannot_be_split(ppo, tmp_path):
    cluster = tmp_path / "split.yaml"
    cluster.write_text("rollout: {tensor_parallel_size: 2}\n")
    assert "got tensor_parallel_size=2, expected 1" in refused(ppo, tmp_path / "o", "--cluster", str(cluster))


def test_a_stop_of_several_tokens(ppo, tmp_path):
    assert "rollout.stop: got 'ab', which is 2" in refused(ppo, tmp_path / "o", "--rollout.stop", "[ab]")


@pytest.mark.parametrize("role", ["policy", "critic"])
def test_adapter_names_without_a_layer(ppo, tmp_path, role):
    flags = [f"--{role}.adapter.r", "4", f"--{role}.adapter.target_modules", "[query]"]
    assert f"{role}: adapter.target_modules: got ('query',)" in refused(ppo, tmp_path / "o", *flags)


def test_a_tracker_that_is_not_installed(ppo, tmp_path):
    missing = [name for name in ("wandb", "mlflow") if importlib.util.find_spec(name) is None]
    if not missing:
        pytest.skip("every tracker is installed")
    text = refused(ppo, tmp_path / "o", "--run.trackers", f"[{missing[0]}]")
    assert f"run.trackers: got {missing[0]}, expected it installed; pip install" in text


@pytest.mark.parametrize("flags", [["--kl.coef", "0"], ["--kl.horizon", "0.8"]])
def test_a_kl_controller_that_cannot_steer(ppo, tmp_path, flags):
    assert f"{flags[0][2:]}: got {flags[1]}" in refused(ppo, tmp_path / "o", "--kl.target", "6", *flags)


def test_a_reward_folder_without_weights(ppo, tmp_path):
    folder = tmp_path / "judge"
    shutil.copytree(ppo / "reward", folder)
    (folder / "model.safetensors").unlink()
    text = refused(ppo, tmp_path / "o", "--reward.model", str(folder))
    assert f"got {folder} without model.safetensors, expected the weights" in text


@pytest.mark.parametrize("role", ["model.path", "critic.path", "reward.model"])
def test_broken_json_in_a_config(ppo, tmp_path, role):
    folder = tmp_path / "broken"
    shutil.copytree(ppo / ("reward" if role == "reward.model" else "policy"), folder)
    (folder / "config.json").write_text('{"model_type": "llama",')
    text = refused(ppo, tmp_path / "o", f"--{role}", str(folder))
    assert f"{folder}/config.json: got JSON that is broken (Expecting property name" in text


def test_a_critic_with_too_few_embeddings(ppo, tmp_path):
    folder = write_tiny_model(tmp_path / "small")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    assert "critic: tokenizer: got token ids up to 258" in refused(ppo, tmp_path / "o", "--critic.path", str(folder))


@pytest.mark.parametrize("key", ["model.path", "critic.path", "reward.model", "data.source.hub"])
def test_a_hub_name_without_a_hub(ppo, tmp_path, key):
    """The address takes connections and never answers: the slowest way of not being there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}", "HF_HUB_OFFLINE": "0"}
        text = refused(
            ppo, tmp_path / "o", f"--{key}", "owner/name", env={**hub, "HF_HOME": str(tmp_path)}, run=started
        )
    assert "'owner/name'" in text
    assert "the hub is not reachable" in text
    assert "set HF_HUB_OFFLINE=0" in text


def test_a_dry_run_on_a_directory_in_use(ppo, tmp_path):
    code = (
        "import sys, time; from alignment.run_directory import RunDirectory; RunDirectory(sys.argv[1]).lock(); "
        "print('held', flush=True); time.sleep(100)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "o")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert f"in use by pid {holder.pid}" in refused(ppo, tmp_path / "o", "--dry-run")
    finally:
        holder.kill()
        holder.wait()
    assert [path.name for path in (tmp_path / "o").iterdir()] == [".lock"]


def test_weights_that_are_cut_short(ppo, tmp_path):
    shutil.copytree(ppo / "policy", tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    text = refused(ppo, tmp_path / "o", "--model.path", str(tmp_path / "cut"), "--dry-run")
    assert f"got {file}, which is no whole safetensors file" in text


def test_answers_beyond_the_models_positions(ppo, tmp_path):
    text = refused(ppo, tmp_path / "o", "--rollout.max_new_tokens", "500", "--dry-run")
    assert "policy: got sequences of up to 628 tokens" in text
    assert "expected at most the 512 positions" in text


def test_flash_attention_without_a_gpu(ppo, tmp_path):
    flags = ["--model.attention", "flash_attention_2", "--model.dtype", "bfloat16"]
    assert "flash-attn needs a GPU, this is cpu" in refused(ppo, tmp_path / "o", *flags, "--dry-run")


def test_a_reward_function_whose_column_is_missing(ppo, tmp_path):
    functions = '[{"name": "exact_match:multiple_choice"}]'
    assert "expected column 'answer'" in refused(ppo, tmp_path / "o", "--reward.functions", functions, "--dry-run")


def test_a_cluster_that_is_not_there(ppo, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        assert f"RAY_ADDRESS: got '{address}'" in refused(ppo, tmp_path / "o", env={"RAY_ADDRESS": address})
    assert not (tmp_path / "o").exists()


def test_output_directory_that_takes_no_files(ppo):
    """To root even these look writable."""
    assert "expected a writable directory" in refused(ppo, Path("/proc/run"), "--dry-run")


def test_output_directory_that_is_a_file(ppo, tmp_path):
    (tmp_path / "file").write_text("")
    refused(ppo, tmp_path / "file")


def finished(ppo: Path, output: Path) -> Path:
    subprocess.run(
        recipe_command(ppo, output, "--local"),
        check=True,
        capture_output=True,
        timeout=120,
        cwd=ROOT,
    )
    return output


def test_resume_from_a_changed_config_shows_the_difference(ppo, tmp_path):
    output = finished(ppo, tmp_path / "o")
    assert "kl.coef: 0.05 -> 0.2" in refused(ppo, output, "--kl.coef", "0.2")
    assert "--resume never" in refused(ppo, output, "--resume", "never")
    truncated = output / "checkpoints" / "step_000002" / "critic" / "learner.pt"
    truncated.write_bytes(truncated.read_bytes()[:100])
    for flags in ([], ["--dry-run"]):
        text = refused(ppo, output, "--resume", str(truncated.parents[1]), *flags)
        assert "critic/learner.pt has 100 bytes" in text
    assert "kl.coef: 0.05 -> 0.2" in refused(ppo, output, "--kl.coef", "0.2", "--dry-run")


def test_dry_run_prints_plan_and_arithmetic_and_leaves_nothing(ppo, tmp_path):
    done = run_script(recipe_command(ppo, tmp_path / "o", "--dry-run"), timeout=60)
    assert done.returncode == 0, done.stderr
    assert "4 prompts x 1 samples = 4 sequences a step" in done.stdout
    assert "policy + reference" in done.stdout
    assert "GB" in done.stdout
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("script", ["ppo_medical.py", "reward_model_medical.py"])
def test_help_lists_every_key(script):
    done = run_script([sys.executable, str(ROOT / "recipes" / script), "--help"], timeout=60)
    assert done.returncode == 0
    for key in ("--run.seed", "--model.path", "--local", "--dry-run", "--resume"):
        assert key in done.stdout

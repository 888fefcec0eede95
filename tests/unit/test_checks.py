"""What recipes refuse before any actor starts, and what a dry run may not touch."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from tiny import write_tiny_model, write_tiny_reward_model

from actors.build import ppo_actors
from actors.plan import check_cpus, check_gpus, plan_processes
from alignment.checkpoint import CheckpointStore
from alignment.config import ROLES, AdapterConfig, ClusterConfig, ModelConfig, PpoRunConfig
from alignment.config_io import dump_config, load_config
from alignment.data.chat import load_tokenizer
from alignment.run_directory import RunDirectory
from recipes.checks import check_machines, check_model, check_models, check_start, resolve_paths
from recipes.common import parse, restore


@pytest.fixture(autouse=True)
def _same_umask_afterwards():
    before = os.umask(0o022)
    yield
    os.umask(before)


def config_of(tiny: Path, *words: str) -> PpoRunConfig:
    given = ["--model.path", str(tiny / "policy"), "--reward.model", str(tiny / "reward")]
    return load_config(PpoRunConfig, overrides=[*given, *words])


def checked(config: PpoRunConfig) -> int:
    config = resolve_paths(config)
    return check_models(config, load_tokenizer(config.model.path))


def refusal(config: PpoRunConfig) -> str:
    with pytest.raises(ValueError, match=r"(?s)got .*expected .*; ") as error:
        checked(config)
    return str(error.value)


def edited(source: Path, target: Path, **values: object) -> Path:
    """A copy of a model folder with other values in its config.json."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | values))
    return target


def test_models_that_fit_are_counted(tiny):
    # Untied: 259 x 32 twice, two layers of 32 x (32 + 16 + 16 + 32) + 3 x 32 x 64 + 2 x 32, and a norm of 32.
    assert checked(config_of(tiny)) == 2 * 259 * 32 + 2 * (32 * 96 + 3 * 32 * 64 + 64) + 32
    lora = ["--policy.adapter.r", "4", "--policy.adapter.target_modules", "[q_proj, down_proj]"]
    assert checked(config_of(tiny, *lora, "--rollout.stop", "[a, <|endoftext|>]")) > 0


@pytest.mark.parametrize("stop", ["ab", "\\n\\n", ""])
def test_a_stop_of_other_than_one_token(tiny, stop):
    assert "rollout.stop: got" in refusal(config_of(tiny, "--rollout.stop", json.dumps([stop])))


@pytest.mark.parametrize("role", ["policy", "critic"])
@pytest.mark.parametrize("names", ["[query]", "[q_proj, v_porj]", "[score]", "[]"])
def test_adapter_names_without_a_layer(tiny, role, names):
    words = [f"--{role}.adapter.r", "4", f"--{role}.adapter.target_modules", names]
    text = refusal(config_of(tiny, *words))
    assert text.startswith(f"{role}: adapter.target_modules: got ")
    assert "'v_proj'" in text
    assert checked(config_of(tiny, *words[2:])) > 0, "full fine-tuning reads no names"


def test_a_critic_is_resolved_and_its_vocabulary_checked(tiny, tmp_path):
    small = edited(tiny / "policy", tmp_path / "small", vocab_size=100)
    assert refusal(config_of(tiny, "--critic.path", str(small))).startswith(
        "critic: tokenizer: got token ids up to 258"
    )
    assert "missing" in refusal(config_of(tiny, "--critic.path", str(tmp_path / "missing")))
    assert "asset:nothing" in refusal(config_of(tiny, "--critic.path", "asset:nothing"))


def test_an_architecture_without_a_scalar_head(tiny, tmp_path):
    other = edited(tiny / "policy", tmp_path / "mamba", model_type="mamba", architectures=["MambaForCausalLM"])
    text = refusal(config_of(tiny, "--critic.path", str(other)))
    assert "critic: got" in text
    assert "cannot be built with a scalar head" in text


def test_reward_models_that_cannot_score(tiny, tmp_path):
    assert "SequenceClassification" in json.loads((tiny / "reward" / "config.json").read_text())["architectures"][0]
    no_weights = edited(tiny / "reward", tmp_path / "no_weights")
    (no_weights / "model.safetensors").unlink()
    assert "without model.safetensors" in refusal(config_of(tiny, "--reward.model", str(no_weights)))
    broken = edited(tiny / "reward", tmp_path / "broken")
    (broken / "config.json").write_text("{")
    assert f"{broken}/config.json: got JSON that is broken" in refusal(config_of(tiny, "--reward.model", str(broken)))
    small = edited(tiny / "reward", tmp_path / "small", vocab_size=100)
    assert "reward: tokenizer: got token ids" in refusal(config_of(tiny, "--reward.model", str(small)))
    mute = edited(tiny / "reward", tmp_path / "mute")
    (mute / "tokenizer.json").unlink()
    (mute / "tokenizer_config.json").unlink()
    assert "mute': got none that could be loaded" in refusal(config_of(tiny, "--reward.model", str(mute)))


def test_every_actor_gets_resolved_paths_and_its_own_revision(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_tiny_model(tmp_path / "critic")
    write_tiny_reward_model(tmp_path / "judge")
    words = ["--model.revision", "abc", "--critic.path", "~/critic", "--reward.model", "~/judge"]
    config = resolve_paths(config_of(tiny, *words, "--reward.revision", "def"))
    critic_path = config.critic.path
    assert critic_path == str(tmp_path / "critic")
    actors = ppo_actors(config, ClusterConfig(), model_path=config.model.path, critic_path=critic_path)
    assert actors["critic"].model_config.revision is None
    assert (actors["reward_model"].config.model, actors["reward_model"].config.revision) == (
        str(tmp_path / "judge"),
        "def",
    )
    assert {actors[role].model_config.revision for role in ("policy", "reference", "rollout")} == {"abc"}
    follower = resolve_paths(config_of(tiny, "--model.revision", "abc"))
    actors = ppo_actors(follower, ClusterConfig(), model_path=follower.model.path, critic_path=follower.model.path)
    assert actors["critic"].model_config.revision == "abc"


def test_a_scalar_model_is_checked_for_reward_training_too(tiny):
    model = ModelConfig(path=str(tiny / "policy"))
    tokenizer = load_tokenizer(model.path)
    # The head of 32 weights takes the place of the 259 x 32 of the language model's.
    scalar = check_model("policy", model, tokenizer) - 259 * 32 + 32
    assert check_model("training", model, tokenizer, AdapterConfig(r=2), scalar=True) == scalar
    with pytest.raises(ValueError, match=r"training: adapter\.target_modules"):
        check_model("training", model, tokenizer, AdapterConfig(r=2, target_modules=("nope",)), scalar=True)


def test_cpus_that_the_machine_lacks(monkeypatch):
    cluster = ClusterConfig.model_validate({"critic": {"cpus_per_worker": 3.0}})
    plans = plan_processes(cluster)
    # 0.2 each for policy, reference, reward_model, rollout.
    check_cpus(plans, 3.8)
    with pytest.raises(ValueError, match=r"CPU asked 3\.8 / have 3\.7, expected room"):
        check_cpus(plans, 3.7)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    huge = ClusterConfig.model_validate({"critic": {"cpus_per_worker": 4096.0}})
    with pytest.raises(ValueError, match="asked 4096"):
        check_machines(huge, ROLES, local=False)
    check_machines(huge, ROLES, local=True)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    check_machines(huge, ROLES, local=False)


def test_engines_and_their_parts_are_counted_as_gpus():
    settings = {"num_engines": 3, "tensor_parallel_size": 2, "gpus_per_worker": 1, "cpus_per_worker": 0.5}
    cluster = ClusterConfig.model_validate({"rollout": settings, "policy": {"gpus_per_worker": 1.0}})
    engines = next(plan for plan in plan_processes(cluster) if plan.roles == ("rollout",))
    # One process holds both GPUs of its engine.
    assert (engines.num_workers, engines.gpus, engines.cpus) == (3, 2.0, 0.5)
    check_gpus(plan_processes(cluster), 7)
    with pytest.raises(ValueError, match="asks for 7 GPUs, expected at most the 6"):
        check_gpus(plan_processes(cluster), 6)


def test_the_transformers_engine_is_not_split(tiny):
    config = config_of(tiny, "--rollout.engine", "transformers")
    cluster = ClusterConfig.model_validate({"rollout": {"tensor_parallel_size": 2, "gpus_per_worker": 1}})
    with pytest.raises(ValueError, match=r"tensor_parallel_size: got 2 for the transformers engine, expected 1; set"):
        ppo_actors(config, cluster, model_path=config.model.path, critic_path=config.model.path)


def snapshot(folder: Path) -> dict[str, tuple[float, bytes | None]]:
    return {
        str(path): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in sorted([folder, *folder.rglob("*")])
    }


def job_of(output: Path, *flags: str):
    return parse("ppo_medical", PpoRunConfig, ["--output-dir", str(output), "--dry-run", *flags])


def started(output: Path, *steps: int) -> list[Path]:
    """A run directory as a run that was killed leaves it."""
    directory = RunDirectory(output)
    directory.write_text_atomic(directory.config, dump_config(job_of(output).config))
    store = CheckpointStore(directory.checkpoints, keep=9)
    folders = []
    for step in steps:
        (store.begin(step) / "weights").write_bytes(bytes(step))
        folders.append(store.commit(step))
    return folders


def test_a_dry_run_refuses_what_a_run_would_and_touches_nothing(tmp_path):
    first, second = started(tmp_path / "run", 1, 2)
    (second / "weights").write_bytes(b"damaged")
    held = RunDirectory(tmp_path / "held")
    held.lock()
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    before = snapshot(tmp_path)

    check_start(job_of(tmp_path / "fresh" / "deep"))
    check_start(job_of(tmp_path / "run"))
    check_start(job_of(tmp_path / "run", "--resume", str(first)))
    for output, flags, part in [
        ("held", [], f"in use by pid {os.getpid()}"),
        ("file", [], "got a file, expected a directory"),
        ("file/below", [], "expected a writable directory"),
        ("nowhere", [], "a link that leads nowhere"),
        ("run", ["--kl.coef", "0.7"], "kl.coef: 0.03 -> 0.7"),
        ("run", ["--resume", "never"], "--resume never: got a run"),
        ("run", ["--resume", str(second)], "weights has 7 bytes"),
        ("run", ["--resume", str(tmp_path)], "manifest.json is missing"),
        ("fresh", ["--resume", str(first)], "a checkpoint of another run"),
    ]:
        with pytest.raises(ValueError) as error:
            check_start(job_of(tmp_path / output, *flags))
        assert part in str(error.value)
        assert "expected" in str(error.value)
    assert snapshot(tmp_path) == before


def test_a_dry_run_sees_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    job = job_of(tmp_path / "closed" / "run")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if os.getuid() == 0:  # root may write anywhere
                os.setuid(65534)
            check_start(job)
        except ValueError as error:
            code = 0 if "expected a writable directory" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class Failing:
    """A part whose load fails, as one does from other adapter settings."""

    def load(self, folder: Path):
        raise ValueError(f"{folder}: got other tensors")


def test_later_checkpoints_go_only_once_the_named_one_is_loaded(tmp_path):
    from alignment.loops.run import Run

    first, second, third = started(tmp_path / "run", 1, 2, 3)
    directory = RunDirectory(tmp_path / "run")
    run = Run(directory, num_steps=5, checkpoint_every=1, keep_checkpoints=2)
    job = job_of(tmp_path / "run", "--resume", str(second))
    with pytest.raises(ValueError, match="other tensors"):
        restore(job, run, second, {"policy": Failing()})
    assert third.is_dir()
    (second / "loop.json").write_text('{"step": 2}')
    assert restore(job_of(tmp_path / "run"), run, second, {}) == {"step": 2}
    assert third.is_dir(), "--resume auto deletes nothing"
    assert restore(job, run, second, {}) == {"step": 2}
    assert (first.is_dir(), second.is_dir(), third.exists()) == (True, True, False)

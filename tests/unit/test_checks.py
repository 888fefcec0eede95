"""What recipes refuse before any actor starts, and what a dry run may not touch."""

from __future__ import annotations

import importlib.util
import os
import socket
from pathlib import Path

import pytest

from actors.build import ppo_actors
from actors.plan import check_cpus, check_gpus, plan_processes
from alignment.checkpoint import CheckpointStore
from alignment.config import ROLES, ClusterConfig, ModelConfig, PpoRunConfig, RewardConfig
from alignment.config_io import dump_config
from alignment.run_directory import RunDirectory
from alignment.types import Prompt
from recipes.checks import (
    check_attention,
    check_machines,
    check_reward_functions,
    check_start,
)
from recipes.common import parse, restore


@pytest.fixture(autouse=True)
def _same_umask_afterwards():
    before = os.umask(0o022)
    yield
    os.umask(before)


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
    with socket.create_server(("127.0.0.1", 0)) as cluster:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{cluster.getsockname()[1]}")
        check_machines(huge, ROLES, local=False)
    with pytest.raises(ValueError, match=r"RAY_ADDRESS: got .* expected host:port of a running cluster"):
        check_machines(huge, ROLES, local=False)
    check_machines(huge, ROLES, local=True)
    monkeypatch.setenv("RAY_ADDRESS", "")
    with pytest.raises(ValueError, match="asked 4096"):
        check_machines(huge, ROLES, local=False)


GPU = {"gpus_per_worker": 0.2}


def test_flash_attention_by_name_only_where_it_runs():
    flash = ModelConfig(attention="flash_attention_2", dtype="bfloat16")
    on_gpu = ClusterConfig.model_validate(dict.fromkeys(ROLES, GPU))
    mixed = ClusterConfig.model_validate({**dict.fromkeys(ROLES, GPU), "reward_model": {}})
    with pytest.raises(ValueError, match=r"policy: model\.attention: got flash_attention_2 \(.* needs a GPU, this is"):
        check_attention(flash, ClusterConfig(), ROLES)
    with pytest.raises(ValueError, match=r"reward_model: model\.attention: got flash_attention_2 \(.* needs a GPU"):
        check_attention(flash, mixed, ("reward_model",))
    with pytest.raises(ValueError, match=r"needs bfloat16 or float16\), expected auto, sdpa or eager"):
        check_attention(flash.model_copy(update={"dtype": "float32"}), on_gpu, ROLES)
    if importlib.util.find_spec("flash_attn") is None:
        with pytest.raises(ValueError, match=r"flash-attn is not installed\), expected auto"):
            check_attention(flash, on_gpu, ROLES)
    for attention in ("auto", "sdpa", "eager"):
        check_attention(flash.model_copy(update={"attention": attention}), ClusterConfig(), ROLES)


def test_reward_functions_are_compared_with_the_columns_of_every_prompt(tiny):
    def check(*names: str, **columns: object) -> None:
        rows: list[tuple[str, dict[str, object]]] = [("0", {}), ("1", columns)]
        prompts = [Prompt(id=name, messages=(), prompt_ids=(), columns=some) for name, some in rows]
        functions = [{"name": name} for name in names]
        check_reward_functions(RewardConfig.model_validate({"model": "m", "functions": functions}), prompts)

    check("exact_match:multiple_choice", "text:length_between", answer="A", topic=1)
    check(lengths=1)
    with pytest.raises(ValueError, match=r"for data with the columns \['topic'\], expected column 'answer'"):
        check("exact_match:multiple_choice", topic=1)
    with pytest.raises(ValueError, match="got a column 'lengths' in the data, expected none of prompts, responses"):
        check("text:no_refusal", lengths=1)


@pytest.mark.parametrize(
    ("gold", "refusal"),
    [
        ({"name": "text:no_such"}, "got 'no_such' in rewards.text"),
        ({"name": "text:length_between", "settings": {"min_word": 3}}, r"reward\.gold: got a setting 'min_word'"),
        ({"name": "exact_match:multiple_choice"}, r"reward\.gold: got exact_match:multiple_choice for data with"),
    ],
)
def test_gold_functions_are_checked_like_the_others(gold, refusal):
    with pytest.raises(ValueError, match=refusal):
        check_reward_functions(RewardConfig.model_validate({"model": "m", "gold": [gold]}), [])


def test_engines_and_their_parts_are_counted_as_gpus():
    settings = {"num_engines": 3, "tensor_parallel_size": 2, "gpus_per_worker": 1, "cpus_per_worker": 0.5}
    cluster = ClusterConfig.model_validate({"rollout": settings, "policy": {"gpus_per_worker": 1.0}})
    engines = next(plan for plan in plan_processes(cluster) if plan.roles == ("rollout",))
    # One process holds both GPUs of its engine.
    assert (engines.num_workers, engines.gpus, engines.cpus) == (3, 2.0, 0.5)
    check_gpus(plan_processes(cluster), 7)
    with pytest.raises(ValueError, match="asks for 7 GPUs, expected at most the 6"):
        check_gpus(plan_processes(cluster), 6)


def test_the_transformers_engine_is_not_split():
    config = PpoRunConfig.model_validate({"rollout": {"engine": "transformers"}, "reward": {"model": "m"}})
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
    with pytest.raises(ValueError, match=r"got /proc, which takes no new file .*expected a writable directory"):
        check_start(job_of(Path("/proc/run")))
    for output, flags, part in [
        ("held", [], f"in use by pid {os.getpid()}"),
        ("file", [], "got a file, expected a directory"),
        ("x" * 300, [], "got File name too long, expected a writable directory"),
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

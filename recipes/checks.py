"""What is checked before any actor starts. Every refusal says what was got, what is expected and what to do."""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from alignment.config import AdapterConfig, ClusterConfig, ModelConfig, PpoRunConfig, RewardConfig
from alignment.config.splitting import refuse_splitting
from alignment.config_io import diff_configs, read_yaml

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from alignment.checkpoint import CheckpointStore
    from alignment.types import Prompt
    from recipes.common import ConfigT, Job


def refuse_intruders() -> None:
    """`alignment` and `recipes` are import names of other distributions too; two of them on one path lose silently."""
    owners = importlib.metadata.packages_distributions()
    for package in ("alignment", "actors", "rewards", "recipes"):
        others = sorted(set(owners.get(package, [])) - {"raylign"})
        if others:
            raise ValueError(
                f"environment: got package {package!r} from {others} too, expected it from raylign alone; "
                f"pip uninstall {' '.join(others)}"
            )


def resolve_paths(config: PpoRunConfig) -> PpoRunConfig:
    """The config with the path of every model as transformers takes it. A reward model to be trained first stays."""
    from alignment.data.model_assets import resolve_model

    model, critic, reward = config.model, config.critic, config.reward
    path = resolve_model(model.path, model.revision)
    if critic.path is not None:
        own = model.at(critic.path, critic.revision)
        critic = critic.model_copy(update={"path": resolve_model(own.path, own.revision), "revision": own.revision})
    elif critic.revision is not None:
        resolve_model(model.path, critic.revision)
    if reward.model is not None:
        own = model.at(str(Path(reward.model).expanduser()), reward.revision)
        where = own.path if is_own_reward_model(own.path) else resolve_model(own.path, own.revision)
        reward = reward.model_copy(update={"model": where, "revision": own.revision})
    return config.model_copy(
        update={"model": model.model_copy(update={"path": path}), "critic": critic, "reward": reward}
    )


def check_models(config: PpoRunConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Policy, critic and reward model of resolved paths, on no memory. Returns the policy's number of parameters."""
    from alignment.data.chat import single_token
    from alignment.model_checks import check_model

    for stop in config.rollout.stop:
        single_token(tokenizer, stop)
    lengths = answer_lengths(config)
    num_parameters = check_model("policy", config.model, tokenizer, config.policy.adapter, lengths=lengths)
    critic = config.model.at(config.critic.path or config.model.path, config.critic.revision)
    check_model("critic", critic, tokenizer, config.critic.adapter, head="zeros", lengths=lengths)
    if config.reward.model is not None and not is_own_reward_model(config.reward.model):
        check_reward_model(config)
    return num_parameters


def check_reward_model(config: PpoRunConfig) -> None:
    """The folder that scores: its weights, its head, its template, and the scale of its scores."""
    from actors.reward import load_statistics
    from alignment.data.chat import encode_conversation, eos_ids_of_model, load_tokenizer
    from alignment.model_checks import check_model

    assert config.reward.model is not None
    reward = config.model.at(config.reward.model, config.reward.revision)
    tokenizer = load_tokenizer(reward.path, reward.revision)
    # It reads every answer as a finished turn: one that the limit cut off gets an end token there.
    check_model("reward", reward, tokenizer, head="require", lengths={**answer_lengths(config), "its end token": 1})
    sample = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]
    encode_conversation(tokenizer, sample, eos_ids=eos_ids_of_model(tokenizer, reward.path, reward.revision))
    if config.reward.standardize_model:
        load_statistics(Path(reward.path))


def answer_lengths(config: PpoRunConfig) -> dict[str, int]:
    """What the longest sequence of a PPO run is made of, in tokens."""
    return {
        "data.max_prompt_tokens": config.data.max_prompt_tokens,
        "rollout.max_new_tokens": config.rollout.max_new_tokens,
    }


def check_machines(cluster: ClusterConfig, roles: tuple[str, ...], *, local: bool) -> None:
    """Refuse what is asked for and not on this machine. A cluster's machines only Ray knows: asked at the start."""
    import torch

    from actors.launch import check_address
    from actors.plan import check_cpus, check_gpus, plan_processes

    plans = plan_processes(cluster, roles)
    if address := "" if local else os.environ.get("RAY_ADDRESS", ""):
        check_address(address)
        return
    check_gpus(plans, torch.cuda.device_count() if torch.cuda.is_available() else 0)
    if not local:
        check_cpus(plans, os.cpu_count() or 1)


def check_rollout(config: PpoRunConfig, cluster: ClusterConfig, *, local: bool) -> None:
    """Refuse what the rollout engine would refuse once all models are loaded. `config`: of resolved paths."""
    from transformers import AutoConfig

    from actors.engines import choose_engine
    from actors.engines.vllm_checks import check_vllm
    from actors.listening import check_endpoint
    from actors.rollout import rank_of_sync
    from actors.worker import choose_device

    if choose_engine(config.rollout.engine, cluster.rollout.engine) == "vllm":
        device = choose_device(cluster.rollout.gpus_per_worker)
        check_vllm(
            config.rollout.vllm,
            AutoConfig.from_pretrained(config.model.path, revision=config.model.revision),
            dtype=config.model.dtype,
            device=device,
            adapter_rank=rank_of_sync(config.rollout, config.policy.adapter, device),
            lengths=answer_lengths(config),
            endpoint=config.rollout.endpoint_port is not None,
        )
    if config.rollout.endpoint_port is not None and (local or not os.environ.get("RAY_ADDRESS")):
        check_endpoint(config.rollout.endpoint_port)


def check_attention(model: ModelConfig, cluster: ClusterConfig, roles: Iterable[str]) -> None:
    """Refuse an attention implementation that cannot run where the roles are placed."""
    import torch

    from actors.worker import choose_device
    from alignment.models import DTYPES, choose_attention

    for role in roles:
        device = torch.device(choose_device(getattr(cluster, role).gpus_per_worker))
        try:
            choose_attention(model.attention, dtype=DTYPES[model.dtype], device=device)
        except ValueError as error:
            raise ValueError(f"{role}: {error}") from None


def check_splitting(model: ModelConfig, cluster: ClusterConfig, adapters: Mapping[str, AdapterConfig]) -> None:
    """Refuse what a role's engine cannot split over its workers. `adapters`: of each role that may be split."""
    import importlib.util

    for role, adapter in adapters.items():
        machines = getattr(cluster, role)
        if machines.engine == "deepspeed" and role != "reference" and importlib.util.find_spec("deepspeed") is None:
            raise ValueError(
                f"{role}.engine: got deepspeed, which is not installed, expected it or torch; "
                "pip install 'raylign[deepspeed]', or engine: torch, which splits by FSDP2"
            )
        refuse_splitting(role, machines, adapter, dtype=model.dtype)


def check_reward_functions(reward: RewardConfig, prompts: Iterable[Prompt]) -> None:
    """Every rule, gold ones too, exists, takes its settings, and can be called with the columns of the prompts."""
    from rewards.base import check_columns, check_settings, load_function

    columns = {name for prompt in prompts for name in prompt.columns}
    for key, functions in (("reward.functions", reward.functions), ("reward.gold", reward.gold)):
        for function in functions:
            loaded = load_function(function.name)
            check_settings(function.name, loaded, function.settings, key=key)
            check_columns(function.name, loaded, columns, function.settings, key=key)


def is_own_reward_model(path: str) -> bool:
    """True for the folder that recipes/reward_model_medical.py writes, until its last file is there."""
    return (
        Path(path).name == "final"
        and "reward_model_medical" in Path(path).parts
        and not (Path(path) / "score_statistics.json").is_file()
    )


def untrained_reward_model(config: PpoRunConfig) -> Path | None:
    """The run directory of the reward model that has to be trained first; None when none has to."""
    path = config.reward.model
    return Path(path).parent if path is not None and is_own_reward_model(path) else None


def check_start(job: Job[ConfigT]) -> None:
    """What `open_run_directory` refuses, for a dry run: nothing on disk is created or changed."""
    from alignment.run_directory import check_run_directory

    check_run_directory(job.output_dir)
    checkpoint_to_resume(job)


def checkpoint_to_resume(job: Job[ConfigT]) -> tuple[Path | None, list[str]]:
    """The verified checkpoint that the run starts from, None for a fresh start; and what to tell of those passed over.

    Raises:
        ValueError: a run of another config is there, or one at all with `--resume never`; the checkpoint named is
            damaged or another run's.
    """
    from alignment.checkpoint import CheckpointStore
    from alignment.run_directory import trained

    saved = job.output_dir / "config.yaml"
    store = CheckpointStore(job.output_dir / "checkpoints", keep=1)
    if job.resume == "never" and (saved.exists() or store.complete()):
        raise ValueError(
            f"--resume never: got a run in {job.output_dir}, expected a directory without one; "
            "choose another --output-dir, or --resume auto"
        )
    if saved.exists():
        changes = diff_configs(read_yaml(saved), job.config.model_dump(mode="json"))
        if changes and trained(job.output_dir):
            raise ValueError(
                f"--resume: got a config that differs from the run in {job.output_dir}:\n  "
                + "\n  ".join(changes)
                + "\nexpected the same config; undo the change, or choose another --output-dir"
            )
    if job.resume not in ("auto", "never"):
        return _named_checkpoint(Path(job.resume), store), []
    found, passed_over = store.latest_valid()
    return found, [
        f"checkpoint of step {step} is not used: {reason}; looking for an older one" for step, reason in passed_over
    ]


def _named_checkpoint(chosen: Path, store: CheckpointStore) -> Path:
    reason = store.verify_folder(chosen) if chosen.is_dir() else "no such folder"
    if reason is None and chosen.resolve().parent != store.folder.resolve():
        reason = "a checkpoint of another run"
    if reason is None and not re.fullmatch(r"step_\d{6,}", chosen.name):
        reason = "not the folder of a step"
    if reason:
        raise ValueError(f"--resume: got {chosen} ({reason}), expected a complete checkpoint; use --resume auto")
    return chosen

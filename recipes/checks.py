"""What is checked before any actor starts. Every refusal says what was got, what is expected and what to do."""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.config import (
    AdapterConfig,
    ClusterConfig,
    DpoRunConfig,
    KtoRunConfig,
    LiveRunConfig,
    ModelConfig,
    PpoRunConfig,
    RankedRunConfig,
    RewardConfig,
    RewardModelRunConfig,
    RolloutConfig,
    SftRunConfig,
)
from alignment.config.splitting import refuse_splitting
from alignment.config_io import diff_configs, read_yaml

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from alignment.checkpoint import CheckpointStore
    from alignment.types import Prompt
    from recipes.common import ConfigT, Job


UPSTREAM = {
    "reward_model_medical": "score_statistics.json",
    "sft_calculators": "README.md",
    "rank_answers": "README.md",
    "sft_films": "README.md",
    "sft_films_early": "README.md",
    "dpo_recommender_early": "README.md",
}
"""Recipes that other runs begin with, and the last file that each writes in its `final`."""


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
    """The config with the path of every model as transformers takes it.

    A reward model to be trained first stays; for a policy to be trained first stands what its training begins with.
    """
    from alignment.data.model_assets import resolve_model

    model, critic = config.model, config.critic
    if critic.path is not None:
        own = model.at(critic.path, critic.revision)
        critic = critic.model_copy(update={"path": resolve_model(own.path, own.revision), "revision": own.revision})
    elif critic.revision is not None:
        resolve_model(model.path, critic.revision)
    reward = resolve_reward(config.reward, model)
    return config.model_copy(update={"model": resolve_policy(model), "critic": critic, "reward": reward})


def resolve_policy(model: ModelConfig) -> ModelConfig:
    """See `resolve_paths`."""
    from alignment.data.model_assets import resolve_model

    first = upstream_of(model.path)
    path = resolve_model(model.path if first is None else _base_of(first), model.revision)
    return model.model_copy(update={"path": path})


def resolve_reward(reward: RewardConfig, model: ModelConfig) -> RewardConfig:
    """See `resolve_paths`. `model`: the policy, as configured."""
    from alignment.data.model_assets import resolve_model

    if reward.model is None:
        return reward
    own = model.at(str(Path(reward.model).expanduser()), reward.revision)
    where = own.path if upstream_of(own.path) else resolve_model(own.path, own.revision)
    more = tuple(resolve_model(path, model.at(path, None).revision) for path in reward.ensemble.models)
    ensemble = reward.ensemble.model_copy(update={"models": more})
    return reward.model_copy(update={"model": where, "revision": own.revision, "ensemble": ensemble})


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainee:
    """The one model that a run trains on examples, checked but not loaded."""

    path: str
    """As transformers takes it."""
    tokenizer: PreTrainedTokenizerBase
    eos_ids: frozenset[int]
    num_parameters: int


def check_trainee(
    job: Job[SftRunConfig] | Job[RewardModelRunConfig] | Job[DpoRunConfig] | Job[KtoRunConfig] | Job[LiveRunConfig],
    role: str,
    **settings: Any,
) -> Trainee:
    """Refuse machines, trackers or a model that a run on examples cannot be had with.

    Args:
        role: whose machines train.
        settings: of `alignment.model_checks.check_model`.
    """
    from alignment.data.chat import eos_ids_of_model, load_tokenizer
    from alignment.data.model_assets import resolve_model
    from alignment.metrics import check_trackers
    from alignment.model_checks import check_model

    config = job.config
    check_machines(job.cluster, (role,), local=job.local)
    check_attention(config.model, job.cluster, (role,))
    if not job.local:
        check_splitting(config.model, job.cluster, {role: config.training.adapter})
    check_trackers(config.run.trackers)
    path, revision = resolve_model(config.model.path, config.model.revision), config.model.revision
    tokenizer = load_tokenizer(path, revision)
    num_parameters = check_model(
        "training",
        config.model.at(path, revision),
        tokenizer,
        config.training.adapter,
        lengths={"data.max_tokens": config.data.max_tokens},
        **settings,
    )
    ends = eos_ids_of_model(tokenizer, path, revision)
    return Trainee(path=path, tokenizer=tokenizer, eos_ids=ends, num_parameters=num_parameters)


def check_answering(job: Job[Any]) -> None:
    """Refuse machines on which no worker of the policy can answer a prompt, since each holds a part of the model."""
    machines = job.cluster.policy
    splits = machines.zero_stage == 3 if machines.engine == "deepspeed" else machines.zero_stage >= 2
    if not job.local and splits and (machines.num_workers > 1 or machines.engine == "deepspeed"):
        raise ValueError(
            f"policy.zero_stage: got {machines.zero_stage} of engine {machines.engine} in a run that asks the model "
            "questions, expected workers that hold the whole model; set zero_stage: 0, or engine: deepspeed with "
            "zero_stage: 2"
        )


def check_models(config: PpoRunConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Policy, critic and reward model of resolved paths, on no memory. Returns the policy's number of parameters."""
    from alignment.model_checks import check_model

    check_stops(config.rollout, tokenizer)
    lengths = answer_lengths(config)
    num_parameters = check_model("policy", config.model, tokenizer, config.policy.adapter, lengths=lengths)
    critic = config.model.at(config.critic.path or config.model.path, config.critic.revision)
    check_model("critic", critic, tokenizer, config.critic.adapter, head="zeros", lengths=lengths)
    check_reward_models(config)
    return num_parameters


def check_stops(rollout: RolloutConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a stop that is no single token."""
    from alignment.data.chat import single_token

    for stop in rollout.stop:
        single_token(tokenizer, stop)


def check_reward_models(config: PpoRunConfig | RankedRunConfig) -> None:
    """What scores and is there already: weights, head, template, and the scale of the scores."""
    from actors.hosted_model import scales_of
    from alignment.data.chat import encode_conversation, eos_ids_of_model, load_tokenizer
    from alignment.model_checks import check_model

    there = [path for path in config.reward.models if not upstream_of(path)]
    for path in there:
        revision = config.reward.revision if path == config.reward.model else None
        reward = config.model.at(path, revision)
        tokenizer = load_tokenizer(reward.path, reward.revision)
        # It reads every answer as a finished turn: one that the limit cut off gets an end token there.
        lengths = {**answer_lengths(config), "its end token": 1}
        check_model("reward", reward, tokenizer, head="require", lengths=lengths)
        sample = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]
        encode_conversation(tokenizer, sample, eos_ids=eos_ids_of_model(tokenizer, reward.path, reward.revision))
    scales_of(there, standardize=config.reward.standardize_model)


def answer_lengths(config: PpoRunConfig | RankedRunConfig) -> dict[str, int]:
    """What the longest prompt and answer are made of, in tokens."""
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


def check_rollout(
    config: PpoRunConfig | RankedRunConfig, cluster: ClusterConfig, adapter: AdapterConfig, *, local: bool
) -> None:
    """Refuse what the rollout engine would refuse once all models are loaded.

    Args:
        config: of resolved paths.
        adapter: the policy's.
    """
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
            adapter_rank=rank_of_sync(config.rollout, adapter, device),
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


def check_reward_functions(reward: RewardConfig, prompts: Collection[Prompt]) -> None:
    """Every function, gold ones too, exists, takes its settings, has the time that they need, its columns and rows."""
    from actors.reward import pool_functions
    from alignment.config.reward import GOLD
    from rewards.base import check_columns, check_rows, load_function

    columns = {name for prompt in prompts for name in prompt.columns}
    for part, function in pool_functions(reward).items():
        is_gold = part.startswith(GOLD)
        key, limit = ("reward.gold", 1.0) if is_gold else ("reward.functions", reward.max_unscorable)
        loaded = load_function(function.name)
        check_columns(function.name, loaded, columns, function.settings, key=key)
        rows = ((one.where or f"prompt {one.id}", one.messages[-1]["content"], one.columns) for one in prompts)
        check_rows(function.name, loaded, rows, function.settings, max_unscorable=limit, key=key)


def upstream_of(path: str) -> str | None:
    """The recipe in whose `final` a path points, at all of it (a model) or at a file of rows, until its last file is
    there."""
    folder = _final_of(path)
    for recipe, last_file in UPSTREAM.items():
        if folder.name == "final" and recipe in folder.parts and not (folder / last_file).is_file():
            return recipe
    return None


def _final_of(path: str) -> Path:
    named = Path(path)
    return named.parent if named.suffix == ".jsonl" else named


def not_yet_made(paths: Iterable[str | None]) -> dict[str, Path]:
    """Recipes to be run first for models and files of rows, and the run directory of each."""
    return {recipe: _final_of(path).parent for path in paths if path is not None and (recipe := upstream_of(path))}


def untrained(config: PpoRunConfig | RankedRunConfig) -> dict[str, Path]:
    """Recipes to be run first, and the run directory of each."""
    return not_yet_made([config.model.path, config.reward.model])


def _base_of(recipe: str) -> str:
    """The model that an upstream recipe begins with, or the one that another makes for it does."""
    own = read_yaml(Path(__file__).parent / "configs" / f"{recipe}.yaml").get("model") or {}
    path: str = own.get("path", ModelConfig().path)
    first = upstream_of(path)
    return path if first is None else _base_of(first)


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

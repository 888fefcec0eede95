"""What is checked before any actor starts. Every refusal says what was got, what is expected and what to do."""

from __future__ import annotations

import importlib.metadata
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.config import AdapterConfig, ClusterConfig, ModelConfig, PpoRunConfig
from alignment.config_io import diff_configs, read_yaml

if TYPE_CHECKING:
    from alignment.checkpoint import CheckpointStore


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


def check_models(config: PpoRunConfig, tokenizer: Any) -> int:
    """Policy, critic and reward model of resolved paths, on no memory. Returns the policy's number of parameters."""
    from alignment.data.chat import encode_conversation, eos_ids_of_model, load_tokenizer, single_token
    from alignment.data.model_assets import model_file
    from alignment.models import check_scalar_head

    for stop in config.rollout.stop:
        single_token(tokenizer, stop)
    num_parameters = check_model("policy", config.model, tokenizer, config.policy.adapter)
    critic = config.model.at(config.critic.path or config.model.path, config.critic.revision)
    check_model("critic", critic, tokenizer, config.critic.adapter, scalar=True)
    if config.reward.model is not None and not is_own_reward_model(config.reward.model):
        reward = config.model.at(config.reward.model, config.reward.revision)
        check_scalar_head(str(model_file(reward.path, "config.json", reward.revision).parent))
        own_tokenizer = load_tokenizer(reward.path, reward.revision)
        check_model("reward", reward, own_tokenizer, scalar=True)
        # Its template must be able to render what it will score.
        sample = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]
        ends = eos_ids_of_model(own_tokenizer, reward.path, reward.revision)
        encode_conversation(own_tokenizer, sample, eos_ids=ends)
    return num_parameters


def check_model(
    key: str, model: ModelConfig, tokenizer: Any, adapter: AdapterConfig | None = None, *, scalar: bool = False
) -> int:
    """Build a model without memory; refuse ids without embeddings and adapters without layers.

    `key`: its section of the config. Returns the number of parameters.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from alignment.adapters import target_names
    from alignment.data.chat import check_vocabulary

    kind: Any = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    try:
        config = AutoConfig.from_pretrained(model.path, revision=model.revision)
        if scalar:
            config.num_labels = 1
        with torch.device("meta"):
            built = kind.from_config(config)
    except (OSError, ValueError) as error:
        purpose = "a scalar head" if scalar else "a language-model head"
        raise ValueError(
            f"{key}: got {model.path!r}, which cannot be built with {purpose} ({str(error).strip().splitlines()[0]}), "
            "expected an architecture that transformers has built in; choose such a model"
        ) from error
    try:
        check_vocabulary(tokenizer, config.get_text_config().vocab_size)
        if adapter is not None and adapter.r:
            target_names(built, adapter.target_modules, adapter.last_layers)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    return sum(p.numel() for p in {id(p): p for p in built.parameters()}.values())


def check_machines(cluster: ClusterConfig, roles: tuple[str, ...], *, local: bool) -> None:
    """Refuse what is asked for and not on this machine. A cluster's machines only Ray knows: asked at the start."""
    from actors.plan import check_cpus, check_gpus, check_learners, plan_processes

    check_learners(cluster)
    plans = plan_processes(cluster, roles)
    if local or "RAY_ADDRESS" not in os.environ:
        import torch

        check_gpus(plans, torch.cuda.device_count() if torch.cuda.is_available() else 0)
    if not local and "RAY_ADDRESS" not in os.environ:
        check_cpus(plans, os.cpu_count() or 1)


def check_reward_functions(reward: Any) -> None:
    """Every rule reward exists."""
    from rewards.base import load_function

    for function in reward.functions:
        load_function(function.name)


def is_own_reward_model(path: str) -> bool:
    """True for the folder that recipes/reward_model_medical.py writes, until its last file is there."""
    return (
        Path(path).name == "final"
        and "reward_model_medical" in Path(path).parts
        and not (Path(path) / "score_statistics.json").is_file()
    )


def check_start(job: Any) -> None:
    """What `open_run_directory` refuses, for a dry run: nothing on disk is created or changed."""
    from alignment.run_directory import check_run_directory

    check_run_directory(job.output_dir)
    checkpoint_to_resume(job)


def checkpoint_to_resume(job: Any) -> tuple[Path | None, list[str]]:
    """The verified checkpoint that the run starts from, None for a fresh start; and what to tell of those passed over.

    Raises:
        ValueError: a run of another config is there, or one at all with `--resume never`; the checkpoint named is
            damaged or another run's.
    """
    from alignment.checkpoint import CheckpointStore

    saved = job.output_dir / "config.yaml"
    store = CheckpointStore(job.output_dir / "checkpoints", keep=1)
    if job.resume == "never" and (saved.exists() or store.complete()):
        raise ValueError(
            f"--resume never: got a run in {job.output_dir}, expected a directory without one; "
            "choose another --output-dir, or --resume auto"
        )
    if saved.exists():
        changes = diff_configs(read_yaml(saved), job.config.model_dump(mode="json"))
        if changes:
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

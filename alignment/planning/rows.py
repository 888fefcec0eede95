"""What runs that learn from rows come to: supervised ones, reward models, preferences, and pairs made in rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from alignment.config import (
    ROLES,
    ClusterConfig,
    DpoRunConfig,
    IterativeRunConfig,
    KtoRunConfig,
    LiveRunConfig,
    LiveTrainingConfig,
    PreferenceStepsConfig,
    RewardModelRunConfig,
    SftRunConfig,
)
from alignment.config.cluster import RoleConfig
from alignment.config.splitting import refuse_splitting
from alignment.planning.memory import RoleMemory, largest_micro_batch, learner_memory, scorer_memory
from alignment.planning.processes import (
    ProcessMemory,
    process_of,
    reward_models,
    role_groups,
    sampler,
    training_of,
)
from alignment.planning.shape import ModelShape


def reward_model_processes(
    config: RewardModelRunConfig, cluster: ClusterConfig, shape: ModelShape
) -> list[ProcessMemory]:
    """The learners of a reward model; all answers of a row share a forward. Raises as `_offline_processes`."""
    sequences = config.data.sequences_per_row
    return _offline_processes(config, cluster, shape, role="reward_model", sequences=sequences, scalar_head=True)


def sft_processes(config: SftRunConfig, cluster: ClusterConfig, shape: ModelShape) -> list[ProcessMemory]:
    """The learners of a supervised run, every token of an example trained. Raises as `_offline_processes`."""
    return _offline_processes(config, cluster, shape, role="policy", sequences=1, scalar_head=False)


def preference_processes(
    config: DpoRunConfig | KtoRunConfig | LiveRunConfig, cluster: ClusterConfig, shape: ModelShape
) -> list[ProcessMemory]:
    """The learners of a run on pairs or labels, with a frozen copy beside a policy that is trained in full: for the
    whole run where it is live, while the cache is filled where it is not. Raises as `_offline_processes`."""
    sequences = 1 if isinstance(config, KtoRunConfig) else 2
    (learners,) = _offline_processes(config, cluster, shape, role="policy", sequences=sequences, scalar_head=False)
    if config.training.adapter.enabled or config.reference.mode == "none":
        return [learners]
    frozen = _frozen_copy(
        config.training, cluster.policy, shape, config.data.max_tokens, sequences, config.model.dtype
    )
    return [replace(learners, roles={**learners.roles, "reference": frozen})]


def iterative_processes(
    config: IterativeRunConfig,
    cluster: ClusterConfig,
    shapes: Mapping[str, ModelShape],
    *,
    engine: str,
    gpu_bytes: float = 80 * 2**30,
) -> list[ProcessMemory]:
    """Every kind of process of a run in rounds: what learns from pairs, with a frozen copy beside a policy that is
    trained in full, what answers, and the reward models. As `ppo_processes`."""
    training, shape = config.training, shapes["policy"]
    refuse_splitting("policy", cluster.policy, training.adapter, dtype=config.model.dtype)
    names = {"policy", "rollout", *(["reward_model"] if config.reward.model is not None else [])}
    processes = []
    for group in role_groups(cluster, [role for role in ROLES if role in names]):
        roles: dict[str, RoleMemory] = {}
        if "policy" in group:
            roles["policy"] = _learner_of_rows(
                config, cluster.policy, shape, longest=config.max_tokens, sequences=2, scalar_head=False
            )
            if config.dpo.uses_reference and not training.adapter.enabled:
                roles["reference"] = _frozen_copy(
                    training, cluster.policy, shape, config.max_tokens, 2, config.model.dtype
                )
        if "rollout" in group:
            shares = "policy" in group
            roles["rollout"] = sampler(config, cluster, shapes, engine, gpu_bytes, shares_weights=shares)
        if "reward_model" in group:
            roles["reward_model"] = reward_models(config, cluster.reward_model, shapes)
        adapters = [training.adapter] if "policy" in group else []
        made = process_of(cluster, group, {role: roles[role] for role in group}, adapters=adapters)
        processes.append(replace(made, roles=roles))
    return processes


def _frozen_copy(
    training: PreferenceStepsConfig | LiveTrainingConfig,
    machines: RoleConfig,
    shape: ModelShape,
    longest: int,
    sequences: int,
    dtype: str,
) -> RoleMemory:
    """The reference beside a policy that is trained in full."""
    micro = largest_micro_batch(
        training.micro_batch_limit(),
        available=training.batch_size,
        longest=longest,
        answer=longest,
        sequences=sequences,
    )
    parts = machines.num_workers if machines.zero_stage == 3 else 1
    return scorer_memory(shape, micro, dtype=dtype, scalar_head=False, parts=parts)


def _offline_processes(
    config: RewardModelRunConfig | SftRunConfig | DpoRunConfig | KtoRunConfig | LiveRunConfig,
    cluster: ClusterConfig,
    shape: ModelShape,
    *,
    role: str,
    sequences: int,
    scalar_head: bool,
) -> list[ProcessMemory]:
    """The ranks of one learner, whose rows have `sequences` sequences each.

    Raises:
        ValueError: a model that cannot be split as its role's machines say.
    """
    machines: RoleConfig = getattr(cluster, role)
    refuse_splitting(role, machines, config.training.adapter, dtype=config.model.dtype)
    longest = config.data.max_tokens
    memory = _learner_of_rows(config, machines, shape, longest=longest, sequences=sequences, scalar_head=scalar_head)
    return [process_of(cluster, (role,), {role: memory}, adapters=[config.training.adapter])]


def _learner_of_rows(
    config: RewardModelRunConfig | SftRunConfig | DpoRunConfig | KtoRunConfig | LiveRunConfig | IterativeRunConfig,
    machines: RoleConfig,
    shape: ModelShape,
    *,
    longest: int,
    sequences: int,
    scalar_head: bool,
) -> RoleMemory:
    own = config.training
    micro = largest_micro_batch(
        own.micro_batch_limit(),
        available=own.batch_size,
        longest=longest,
        answer=0 if scalar_head else longest,
        sequences=sequences,
    )
    training = training_of(
        shape,
        own.adapter,
        machines,
        checkpointing=config.model.gradient_checkpointing,
        micro_batches=sequences * own.batch_size / (micro.rows * machines.num_workers),
    )
    return learner_memory(
        shape,
        training,
        micro,
        dtype=config.model.dtype,
        scalar_head=scalar_head,
        on_gpu=machines.gpus_per_worker > 0,
    )

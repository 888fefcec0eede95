"""The processes of runs on data that is there: one learner, and a frozen copy of it where a loss compares with one."""

from __future__ import annotations

from dataclasses import replace

from alignment.config import (
    ClusterConfig,
    DpoRunConfig,
    KtoRunConfig,
    LiveRunConfig,
    RewardModelRunConfig,
    SftRunConfig,
)
from alignment.config.cluster import RoleConfig
from alignment.config.splitting import refuse_splitting
from alignment.planning.memory import largest_micro_batch, learner_memory, scorer_memory
from alignment.planning.processes import ProcessMemory, process_of, training_of
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
    machines, longest = cluster.policy, config.data.max_tokens
    micro = largest_micro_batch(
        config.training.micro_batch_limit(),
        available=config.training.batch_size,
        longest=longest,
        answer=longest,
        sequences=sequences,
    )
    frozen = scorer_memory(
        shape,
        micro,
        dtype=config.model.dtype,
        scalar_head=False,
        parts=machines.num_workers if machines.zero_stage == 3 else 1,
    )
    return [replace(learners, roles={**learners.roles, "reference": frozen})]


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
    own, longest = config.training, config.data.max_tokens
    machines: RoleConfig = getattr(cluster, role)
    refuse_splitting(role, machines, own.adapter, dtype=config.model.dtype)
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
    memory = learner_memory(
        shape,
        training,
        micro,
        dtype=config.model.dtype,
        scalar_head=scalar_head,
        on_gpu=machines.gpus_per_worker > 0,
    )
    return [process_of(cluster, (role,), {role: memory}, adapters=[own.adapter])]

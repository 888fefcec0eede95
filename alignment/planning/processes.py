"""What a run's config and a cluster's come to: the roles of every process, and the memory of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from alignment.config import (
    ROLES,
    ClusterConfig,
    PpoRunConfig,
    RankedRunConfig,
    RankRunConfig,
)
from alignment.config.cluster import RoleConfig, RolloutRoleConfig
from alignment.config.model import RANK_TYPES, AdapterConfig
from alignment.config.splitting import refuse_splitting
from alignment.packing import MicroBatchLimit
from alignment.planning.memory import (
    COLUMNS,
    MB,
    MicroBatch,
    RoleMemory,
    Training,
    largest_micro_batch,
    learner_memory,
    one_after_the_other,
    sampler_memory,
    scorer_memory,
    vllm_memory,
)
from alignment.planning.shape import ModelShape
from alignment.planning.trained import adapter_weights

PROCESS_BASE = 350 * MB
"""Resident memory of a process that has imported torch, transformers and ray. Measured, as are the next two."""
ADAPTER_BASE = 55 * MB
"""What importing peft adds."""
QUANTIZATION_BASE = 60 * MB
"""What importing bitsandbytes adds."""
CUDA_HOST_BASE = 2500 * MB
"""Host memory of a process with a CUDA context. An assumption."""
CUDA_BASE = 600 * MB
"""A CUDA context and the libraries' workspaces, on the device. An assumption."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessMemory:
    """One group of processes: each has these roles and this memory."""

    roles: Mapping[str, RoleMemory]
    num_workers: int
    cpus: float
    gpus: float
    parallel: int = 1
    """GPUs that one process' engine is split over."""
    bases: Mapping[str, float] = field(default_factory=dict)
    """Bytes of imports beside the roles."""
    takes_turns: bool = False
    """On a CPU: it uses every core and waits for others that do, and gives back what a call has freed."""

    @property
    def name(self) -> str:
        return " + ".join(self.roles)

    @property
    def roles_bytes(self) -> float:
        """Models live side by side; calls take turns, so one peak counts."""
        return sum(m.held for m in self.roles.values()) + self.passing

    @property
    def passing(self) -> float:
        """The most that a call needs beside what is held between calls."""
        return max(m.passing for m in self.roles.values())

    @property
    def device_bytes(self) -> float:
        """On each of its GPUs; 0 on a CPU."""
        return self.roles_bytes + CUDA_BASE if self.gpus else 0.0

    @property
    def host_bytes(self) -> float:
        """In the node's memory."""
        if not self.gpus:
            return self.roles_bytes + sum(self.bases.values())
        return CUDA_HOST_BASE + sum(m.host for m in self.roles.values())


def role_groups(cluster: ClusterConfig, roles: Sequence[str] = ROLES) -> list[tuple[str, ...]]:
    """The roles of each kind of process: those of `colocate` together, every other one by itself."""
    groups = [tuple(role for role in group if role in roles) for group in cluster.colocate]
    colocated = {role for group in groups for role in group}
    return [group for group in groups if group] + [(role,) for role in roles if role not in colocated]


def gpus_per_process(settings: RoleConfig | RolloutRoleConfig) -> float:
    """A tensor-parallel engine holds all its GPUs in one process, so on one node."""
    if isinstance(settings, RolloutRoleConfig):
        return settings.gpus_per_worker * settings.tensor_parallel_size
    return settings.gpus_per_worker


def comparable_rank(adapter: AdapterConfig) -> int:
    """The rank at which LoRA keeps about as many activations; 0 where all weights are trained."""
    if not adapter.enabled:
        return 0
    return adapter.r if adapter.type in RANK_TYPES else 1


def training_of(
    shape: ModelShape, adapter: AdapterConfig, machines: RoleConfig, *, checkpointing: bool, micro_batches: float
) -> Training:
    return Training(
        added=adapter_weights(shape, adapter) if adapter.enabled else None,
        r=comparable_rank(adapter),
        target_modules=adapter.target_modules,
        last_layers=adapter.last_layers,
        quantization=adapter.quantization,
        checkpointing=checkpointing,
        accumulates=micro_batches > 1,
        ranks=machines.num_workers,
        engine=machines.engine,
        zero_stage=machines.zero_stage,
        offload=machines.offload,
    )


def ppo_processes(
    config: PpoRunConfig,
    cluster: ClusterConfig,
    shapes: Mapping[str, ModelShape],
    *,
    engine: str,
    gpu_bytes: float = 80 * 2**30,
) -> list[ProcessMemory]:
    """Every kind of process of a PPO run.

    Args:
        shapes: of `policy`, `critic` and `reward_model`; of further reward models where they are known, see
            `reward_shape_names`.
        engine: what samples, "transformers" or "vllm".
        gpu_bytes: memory of one GPU, of which vLLM takes its share.

    Raises:
        ValueError: a model that cannot be split as its role's machines say.
    """
    adapters = {"policy": config.policy.adapter, "critic": config.critic.adapter, "reference": config.policy.adapter}
    for role, adapter in adapters.items():
        refuse_splitting(role, getattr(cluster, role), adapter, dtype=config.model.dtype)
    roles = [role for role in ROLES if role != "reward_model" or config.reward.model is not None]
    return [
        process_of(
            cluster,
            group,
            {role: _ppo_role(role, group, config, cluster, shapes, engine, gpu_bytes) for role in group},
            adapters=[getattr(config, role).adapter for role in ("policy", "critic") if role in group],
        )
        for group in role_groups(cluster, roles)
    ]


def _ppo_role(
    role: str,
    group: tuple[str, ...],
    config: PpoRunConfig,
    cluster: ClusterConfig,
    shapes: Mapping[str, ModelShape],
    engine: str,
    gpu_bytes: float,
) -> RoleMemory:
    if role in ("policy", "critic"):
        return _ppo_learner(role, config, getattr(cluster, role), shapes[role])
    if role == "reference":
        shares = "policy" in group and config.policy.adapter.enabled
        return _reference(config, cluster.reference, shapes, shares_weights=shares)
    if role == "reward_model":
        return reward_models(config, cluster.reward_model, shapes)
    return sampler(config, cluster, shapes, engine, gpu_bytes, shares_weights="policy" in group)


def ranking_processes(
    config: RankRunConfig,
    cluster: ClusterConfig,
    shapes: Mapping[str, ModelShape],
    *,
    engine: str,
    gpu_bytes: float = 80 * 2**30,
) -> list[ProcessMemory]:
    """Every kind of process of a ranking run: what answers, and the reward models. As `ppo_processes`."""
    memory = {"rollout": sampler(config, cluster, shapes, engine, gpu_bytes, shares_weights=False)}
    if config.reward.model is not None:
        memory["reward_model"] = reward_models(config, cluster.reward_model, shapes)
    return [
        process_of(cluster, group, {role: memory[role] for role in group}, adapters=[])
        for group in role_groups(cluster, [role for role in ROLES if role in memory])
    ]


def sampler(
    config: PpoRunConfig | RankedRunConfig,
    cluster: ClusterConfig,
    shapes: Mapping[str, ModelShape],
    engine: str,
    gpu_bytes: float,
    *,
    shares_weights: bool,
) -> RoleMemory:
    dtype, on_gpu = config.model.dtype, cluster.rollout.gpus_per_worker > 0
    if engine == "vllm":
        return vllm_memory(
            shapes["policy"],
            dtype=dtype,
            gpu_bytes=gpu_bytes if on_gpu else 0.0,
            memory_share=config.rollout.vllm.memory_share,
            cache_gb=config.rollout.vllm.kv_cache_gb,
            parallel=cluster.rollout.tensor_parallel_size,
        )
    sequences = -(-sequences_of_a_step(config) // cluster.rollout.num_engines)
    return sampler_memory(
        shapes["policy"],
        sequences=min(config.rollout.max_batch, sequences),
        longest=config.data.max_prompt_tokens + config.rollout.max_new_tokens,
        dtype=dtype,
        on_gpu=on_gpu,
        shares_weights=shares_weights,
    )


def _ppo_learner(role: str, config: PpoRunConfig, machines: RoleConfig, shape: ModelShape) -> RoleMemory:
    """The policy or the critic."""
    own, new = getattr(config, role), config.rollout.max_new_tokens
    size, longest = config.ppo.minibatch_size, config.data.max_prompt_tokens + new
    micro = largest_micro_batch(own.micro_batch_limit(), available=size, longest=longest, answer=new)
    training = training_of(
        shape,
        own.adapter,
        machines,
        checkpointing=config.model.gradient_checkpointing,
        micro_batches=size / (micro.rows * machines.num_workers),
    )
    return learner_memory(
        shape,
        training,
        micro,
        dtype=config.model.dtype,
        scalar_head=role == "critic",
        scaled=config.rollout.temperature != 1,
        entropy=config.ppo.entropy_coef > 0,
        on_gpu=machines.gpus_per_worker > 0,
    )


def _reference(
    config: PpoRunConfig, machines: RoleConfig, shapes: Mapping[str, ModelShape], *, shares_weights: bool
) -> RoleMemory:
    """With the policy's micro-batches."""
    return scorer_memory(
        shapes["policy"],
        _scored_at_once(config, config.policy.micro_batch_limit()),
        dtype=config.model.dtype,
        scalar_head=False,
        quantization=config.policy.adapter.quantization,
        scaled=config.rollout.temperature != 1,
        shares_weights=shares_weights,
        parts=machines.num_workers if machines.zero_stage == 3 else 1,
    )


def reward_models(
    config: PpoRunConfig | RankedRunConfig, machines: RoleConfig, shapes: Mapping[str, ModelShape]
) -> RoleMemory:
    micro = _scored_at_once(config, config.reward.micro_batch_limit())
    return one_after_the_other(
        [
            scorer_memory(
                shapes.get(name, shapes["reward_model"]),
                micro,
                dtype=config.model.dtype,
                scalar_head=True,
                scaled=config.rollout.temperature != 1,
                parts=machines.num_workers if machines.zero_stage == 3 else 1,
            )
            for name in reward_shape_names(config)
        ]
    )


def _scored_at_once(config: PpoRunConfig | RankedRunConfig, limit: MicroBatchLimit) -> MicroBatch:
    new = config.rollout.max_new_tokens
    longest = config.data.max_prompt_tokens + new
    return largest_micro_batch(limit, available=sequences_of_a_step(config), longest=longest, answer=new)


def reward_shape_names(config: PpoRunConfig | RankedRunConfig) -> dict[str, str]:
    """The path of every reward model by what its shape is called: `reward_model`, `reward_model/1`, ..."""
    return {f"reward_model{f'/{k}' if k else ''}": path for k, path in enumerate(config.reward.models)}


def sequences_of_a_step(config: PpoRunConfig | RankedRunConfig) -> int:
    """Answers that are sampled and scored together."""
    if isinstance(config, RankedRunConfig):
        return config.ranking.batch_size * config.ranking.num_samples_per_prompt
    return config.ppo.rollout_batch_size * config.ppo.num_samples_per_prompt


def process_of(
    cluster: ClusterConfig,
    group: tuple[str, ...],
    roles: Mapping[str, RoleMemory],
    *,
    adapters: Sequence[AdapterConfig],
) -> ProcessMemory:
    """One kind of process: the roles of `group`, with the memory of each."""
    settings = [getattr(cluster, role) for role in group]
    bases = {
        "imports": PROCESS_BASE,
        "peft": ADAPTER_BASE * any(adapter.enabled for adapter in adapters),
        "bitsandbytes": QUANTIZATION_BASE * any(adapter.quantization != "none" for adapter in adapters),
    }
    return ProcessMemory(
        roles=roles,
        num_workers=settings[0].num_workers,
        cpus=sum(s.cpus_per_worker for s in settings),
        gpus=max(gpus_per_process(s) for s in settings),
        parallel=cluster.rollout.tensor_parallel_size if "rollout" in group else 1,
        bases=bases,
        takes_turns=all(
            s.num_workers == 1 and not s.gpus_per_worker and s.threads_per_worker is None for s in settings
        ),
    )


def memory_table(processes: Sequence[ProcessMemory]) -> str:
    """MB (of 2**20 bytes) of every role and of each process, on the device where it has one, else on the host.

    A role's total is a peak: with a single micro-batch its gradients come as its activations go.
    """
    rows = [f"{'MB':<28} " + " ".join(f"{name:>11}" for name in COLUMNS) + f" {'total':>9}"]
    for process in processes:
        for role, memory in process.roles.items():
            cells = " ".join(f"{getattr(memory, name) / MB:>11,.0f}" for name in COLUMNS)
            rows.append(f"{role:<28} {cells} {memory.total / MB:>9,.0f}")
        where = "each GPU" if process.gpus else "memory"
        total = (process.device_bytes if process.gpus else process.host_bytes) / MB
        base = (CUDA_BASE if process.gpus else sum(process.bases.values())) / MB
        rows.append(
            f"  = {process.num_workers} x ({process.name}): {total:,.0f} MB of {where}, {base:,.0f} of it libraries"
        )
    return "\n".join(rows)

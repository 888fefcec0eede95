"""What a run's config and a cluster's come to: the roles of every process, and the memory of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from alignment.config import ROLES, ClusterConfig, PpoRunConfig, RewardModelRunConfig
from alignment.config.cluster import RoleConfig, RolloutRoleConfig
from alignment.config.model import AdapterConfig
from alignment.planning.memory import (
    COLUMNS,
    MB,
    MicroBatch,
    RoleMemory,
    Training,
    learner_memory,
    sampler_memory,
    scorer_memory,
    vllm_memory,
)
from alignment.planning.shape import ModelShape

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
class Splitting:
    """How the ranks of a learner share it: ZeRO's stage, and whether the optimiser lives in the host's memory."""

    zero_stage: int = 0
    offload: bool = False


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


def training_of(
    adapter: AdapterConfig, *, checkpointing: bool, micro_batches: float, ranks: int, splitting: Splitting
) -> Training:
    return Training(
        r=adapter.r,
        target_modules=adapter.target_modules,
        last_layers=adapter.last_layers,
        quantization=adapter.quantization,
        checkpointing=checkpointing,
        accumulates=micro_batches > 1,
        ranks=ranks,
        zero_stage=splitting.zero_stage,
        offload=splitting.offload,
    )


def ppo_processes(
    config: PpoRunConfig,
    cluster: ClusterConfig,
    shapes: Mapping[str, ModelShape],
    *,
    engine: str,
    gpu_bytes: float = 80 * 2**30,
    splitting: Splitting | None = None,
) -> list[ProcessMemory]:
    """Every kind of process of a PPO run.

    Args:
        shapes: of `policy`, `critic` and `reward_model`.
        engine: what samples, "transformers" or "vllm".
        gpu_bytes: memory of one GPU, of which vLLM takes its share.
    """
    splitting = splitting or Splitting()
    roles = [role for role in ROLES if role != "reward_model" or config.reward.model is not None]
    return [
        _process(
            cluster,
            group,
            {role: _ppo_role(role, group, config, cluster, shapes, engine, gpu_bytes, splitting) for role in group},
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
    splitting: Splitting,
) -> RoleMemory:
    dtype, new = config.model.dtype, config.rollout.max_new_tokens
    longest = config.data.max_prompt_tokens + new
    settings = getattr(cluster, role)
    on_gpu, scaled = settings.gpus_per_worker > 0, config.rollout.temperature != 1
    beside_policy = "policy" in group
    if role in ("policy", "critic"):
        own = getattr(config, role)
        return learner_memory(
            shapes[role],
            training_of(
                own.adapter,
                checkpointing=config.model.gradient_checkpointing,
                micro_batches=config.ppo.minibatch_size / (own.micro_batch_size * settings.num_workers),
                ranks=settings.num_workers,
                splitting=splitting,
            ),
            MicroBatch(rows=min(own.micro_batch_size, config.ppo.minibatch_size), longest=longest, answer=new),
            dtype=dtype,
            scalar_head=role == "critic",
            scaled=scaled,
            entropy=config.ppo.entropy_coef > 0,
            on_gpu=on_gpu,
        )
    if role == "reference":
        return scorer_memory(
            shapes["policy"],
            MicroBatch(rows=config.policy.micro_batch_size, longest=longest, answer=new),
            dtype=dtype,
            scalar_head=False,
            quantization=config.policy.adapter.quantization,
            scaled=scaled,
            shares_weights=beside_policy and config.policy.adapter.r > 0,
        )
    if role == "reward_model":
        micro = MicroBatch(rows=config.reward.micro_batch_size, longest=longest, answer=new)
        return scorer_memory(shapes[role], micro, dtype=dtype, scalar_head=True)
    if engine == "vllm":
        return vllm_memory(
            shapes["policy"],
            dtype=dtype,
            gpu_bytes=gpu_bytes if on_gpu else 0.0,
            memory_share=config.rollout.vllm.memory_share,
            cache_gb=config.rollout.vllm.kv_cache_gb,
            parallel=cluster.rollout.tensor_parallel_size,
        )
    sequences = -(-config.ppo.rollout_batch_size * config.ppo.num_samples_per_prompt // cluster.rollout.num_engines)
    return sampler_memory(
        shapes["policy"],
        sequences=min(config.rollout.max_batch, sequences),
        longest=longest,
        dtype=dtype,
        on_gpu=on_gpu,
        shares_weights=beside_policy,
    )


def reward_model_processes(
    config: RewardModelRunConfig, cluster: ClusterConfig, shape: ModelShape, *, splitting: Splitting | None = None
) -> list[ProcessMemory]:
    """The learners of a reward model; both answers of a pair share a forward."""
    own, settings = config.training, cluster.reward_model
    memory = learner_memory(
        shape,
        training_of(
            own.adapter,
            checkpointing=config.model.gradient_checkpointing,
            micro_batches=own.batch_size / (own.micro_batch_size * settings.num_workers),
            ranks=settings.num_workers,
            splitting=splitting or Splitting(),
        ),
        MicroBatch(rows=2 * min(own.micro_batch_size, own.batch_size), longest=config.data.max_tokens, answer=0),
        dtype=config.model.dtype,
        scalar_head=True,
        on_gpu=settings.gpus_per_worker > 0,
    )
    return [_process(cluster, ("reward_model",), {"reward_model": memory}, adapters=[own.adapter])]


def _process(
    cluster: ClusterConfig,
    group: tuple[str, ...],
    roles: Mapping[str, RoleMemory],
    *,
    adapters: Sequence[AdapterConfig],
) -> ProcessMemory:
    settings = [getattr(cluster, role) for role in group]
    bases = {
        "imports": PROCESS_BASE,
        "peft": ADAPTER_BASE * any(adapter.r for adapter in adapters),
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

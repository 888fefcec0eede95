"""What of a role's splitting its model refuses."""

from __future__ import annotations

from alignment.config.cluster import RoleConfig
from alignment.config.model import AdapterConfig

DEEPSPEED_TYPES = ("lora", "rslora")
"""Adapters that DeepSpeed's engines train."""
WHOLE_TYPES = ("adalora", "half")
"""Methods that look at whole gradients, or freeze parameters while the run goes on."""


def refuse_splitting(role: str, machines: RoleConfig, adapter: AdapterConfig, *, dtype: str) -> None:
    """Refuse what a role's engine cannot split over its workers.

    Args:
        adapter: what the role trains, or for a reference what its policy does.
        dtype: of the weights.
    """
    meets = machines.num_workers > 1 and (role != "reference" or machines.zero_stage == 3)
    if meets and 0 < machines.gpus_per_worker < 1:
        raise ValueError(
            f"{role}.gpus_per_worker: got {machines.gpus_per_worker:g} with num_workers {machines.num_workers}, "
            "expected 1: ranks that share a GPU cannot talk to each other over NCCL; set it to 1, or num_workers: 1"
        )
    if role != "reference":
        refuse_split_adapter(role, machines, adapter)
    if machines.engine == "deepspeed" and role != "reference" and dtype != "float32":
        refuse_low_stage(machines.zero_stage, f"{role}.")
    if adapter.quantization != "none" and (machines.zero_stage or machines.engine == "deepspeed"):
        raise ValueError(
            f"{role}.zero_stage: got {machines.zero_stage} of engine {machines.engine} with adapter.quantization "
            f"{adapter.quantization}, expected 0 of engine torch: weights of four bits are not split; let "
            "every worker hold all of them, an eighth of float32"
        )


def refuse_split_adapter(role: str, machines: RoleConfig, adapter: AdapterConfig) -> None:
    """What reads whole gradients, or freezes parameters on the way, has to find them whole on every worker. DeepSpeed
    gathers a matrix for its own layer only, and most adapters are computed beside it."""
    if machines.engine == "deepspeed" and adapter.type not in DEEPSPEED_TYPES:
        raise ValueError(
            f"{role}.engine: got deepspeed with adapter.type={adapter.type}, expected torch; set engine: torch, or "
            f"adapter.type to one of {', '.join(DEEPSPEED_TYPES)}"
        )
    if machines.zero_stage and adapter.type in WHOLE_TYPES:
        raise ValueError(
            f"{role}.zero_stage: got {machines.zero_stage} with adapter.type={adapter.type}, expected 0, where every "
            "worker has whole gradients; set it to 0, or choose another adapter.type"
        )


def refuse_low_stage(zero_stage: int, role: str = "") -> None:
    """Below float32 DeepSpeed's stages 0 and 1 sum gradients in the narrow dtype, and step on what is not finite."""
    if zero_stage < 2:
        raise ValueError(
            f"{role}zero_stage: got {zero_stage} of engine deepspeed with model.dtype bfloat16, expected 2 or 3, "
            "which sum gradients in float32; set zero_stage: 2, or engine: torch"
        )

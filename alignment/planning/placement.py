"""Where PACK would put the processes of a run on a described cluster, and what is missing there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from alignment.planning.processes import ProcessMemory

GB = 2**30
ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Machines:
    """Equal nodes. Memory in GB of 2**30 bytes."""

    nodes: int = 1
    gpus_per_node: int = 0
    gpu_memory_gb: float = 80.0
    cpus_per_node: float = 1.0
    node_memory_gb: float = 16.0


@dataclass(slots=True)
class Device:
    """One GPU: the share of it that is left, and the processes on it."""

    free: float = 1.0
    processes: list[ProcessMemory] = field(default_factory=list)

    @property
    def used(self) -> float:
        return sum(process.device_bytes for process in self.processes)


@dataclass(slots=True)
class Node:
    """One machine and what stands on it."""

    cpus: float
    gpus: list[Device]
    processes: list[ProcessMemory] = field(default_factory=list)

    @property
    def used(self) -> float:
        """At the peak: of processes that take turns, one call's memory at a time."""
        turns = [process.passing for process in self.processes if process.takes_turns]
        return sum(process.host_bytes for process in self.processes) - sum(turns) + max(turns, default=0.0)

    def devices_for(self, process: ProcessMemory) -> list[Device] | None:
        """The GPUs that the process would get, [] where it asks for none, None where there are not enough.

        Ray hands out whole GPUs, or a share of one.
        """
        if process.gpus == 0:
            return []
        whole = process.gpus >= 1
        needed, share = (round(process.gpus), 1.0) if whole else (1, process.gpus)
        fitting = [gpu for gpu in self.gpus if gpu.free + ROUNDING >= share][:needed]
        return fitting if len(fitting) == needed else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """Nodes with their processes, and what is missing."""

    nodes: list[Node]
    missing: list[str]
    short_of: set[str]
    """Roles that do not fit."""

    @property
    def fits(self) -> bool:
        return not self.missing


def place(processes: Sequence[ProcessMemory], machines: Machines) -> Placed:
    """Reserve as Ray's PACK does, each process on the first node with room, and add memory up."""
    nodes = [
        Node(cpus=machines.cpus_per_node, gpus=[Device() for _ in range(machines.gpus_per_node)])
        for _ in range(machines.nodes)
    ]
    missing: list[str] = []
    short_of: set[str] = set()
    for process in processes:
        left = process.num_workers
        while left and _reserve(process, nodes):
            left -= 1
        if left:
            missing.append(
                f"{process.name}: {left} of {process.num_workers} processes find no node with {process.cpus:g} CPUs "
                f"and {process.gpus:g} GPUs free"
            )
    for index, node in enumerate(nodes):
        for number, gpu in enumerate(node.gpus):
            if (over := gpu.used - machines.gpu_memory_gb * GB) > 0:
                missing.append(_short(f"GPU {number} of node {index}", gpu.processes, over, machines.gpu_memory_gb))
                short_of |= {role for process in gpu.processes for role in process.roles}
        if (over := node.used - machines.node_memory_gb * GB) > 0:
            missing.append(_short(f"node {index}", node.processes, over, machines.node_memory_gb))
            short_of |= {role for process in node.processes for role in process.roles if not process.gpus}
    return Placed(nodes=nodes, missing=missing, short_of=short_of)


def _reserve(process: ProcessMemory, nodes: Sequence[Node]) -> bool:
    for node in nodes:
        devices = node.devices_for(process)
        if node.cpus + ROUNDING < process.cpus or devices is None:
            continue
        node.cpus -= process.cpus
        node.processes.append(process)
        for device in devices:
            device.free -= min(process.gpus, 1.0)
            device.processes.append(process)
        return True
    return False


def _short(where: str, processes: Sequence[ProcessMemory], over: float, have: float) -> str:
    names = ", ".join(dict.fromkeys(process.name for process in processes))
    return f"{names}: {over / GB:.1f} GB missing on {where}, which has {have:g}"


def placement_table(placed: Placed, machines: Machines) -> str:
    """What each node and GPU would hold, and the verdict."""
    rows = []
    for index, node in enumerate(placed.nodes):
        names = [process.name for process in node.processes]
        if not names:
            continue
        count = ", ".join(f"{names.count(name)} x ({name})" for name in dict.fromkeys(names))
        rows.append(f"node {index}: {node.used / GB:.1f} of {machines.node_memory_gb:g} GB; {count}")
        rows += [
            f"  GPU {number}: {gpu.used / GB:.1f} of {machines.gpu_memory_gb:g} GB; "
            + ", ".join(process.name for process in gpu.processes)
            for number, gpu in enumerate(node.gpus)
            if gpu.processes
        ]
    rows += ["fits"] if placed.fits else [f"missing: {line}" for line in placed.missing]
    return "\n".join(rows)

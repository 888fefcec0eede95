"""Which processes a cluster YAML asks for. Plain arithmetic: it also serves in-process runs and `--dry-run`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from actors.worker import LEARNERS
from alignment.config import ROLES, AdapterConfig, ClusterConfig, ModelConfig, PpoRunConfig, RunConfig
from alignment.config.cluster import Placement, RoleConfig, RolloutRoleConfig
from alignment.planning.processes import gpus_per_process, role_groups


class PlacementError(ValueError):
    """The cluster does not have what the cluster YAML asks for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessPlan:
    """One group of processes: the roles in each, how many, and what each reserves."""

    roles: tuple[str, ...]
    num_workers: int
    cpus: float
    gpus: float
    threads: int
    split: bool = False
    """Whether each holds a part of a model only."""
    placement: Placement | None = None
    """Of these processes by themselves; None: together with all others."""
    resources: Mapping[str, float] = field(default_factory=dict)
    """Custom ones, of each."""

    @property
    def bundle(self) -> dict[str, float]:
        """What each reserves, under Ray's names."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {}) | dict(self.resources)

    @property
    def takes_turns(self) -> bool:
        """Without a GPU, a process that uses every core shares them in time, not in space. Ranks wait for each other
        within a call: were they to take turns, the first would keep its turn for ever."""
        return self.gpus == 0 and self.threads >= (os.cpu_count() or 1) and not self.has_ranks

    @property
    def has_ranks(self) -> bool:
        """Whether its processes are the ranks of a learner, or hold a model in parts."""
        return self.num_workers > 1 and (self.split or not LEARNERS.isdisjoint(self.roles))


def plan_processes(cluster: ClusterConfig, roles: Sequence[str] = ROLES) -> list[ProcessPlan]:
    """Colocated roles share a process and add up their reservations; every other role has its own."""
    plans = []
    for group in role_groups(cluster, roles):
        settings = [getattr(cluster, role) for role in group]
        plans.append(
            ProcessPlan(
                roles=group,
                num_workers=settings[0].num_workers,
                cpus=sum(s.cpus_per_worker for s in settings),
                gpus=max(gpus_per_process(s) for s in settings),
                threads=max(threads_of(s) for s in settings),
                split=any(isinstance(s, RoleConfig) and s.zero_stage == 3 for s in settings),
                placement=next((s.placement for s in settings if s.placement), None),
                resources=_largest([s.resources for s in settings]),
            )
        )
    return plans


def _largest(amounts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Roles of one process are pinned together, so they share what pins them."""
    return {name: max(one.get(name, 0.0) for one in amounts) for name in sorted(set().union(*amounts))}


def threads_of(settings: RoleConfig | RolloutRoleConfig) -> int:
    """Of each worker, unless the YAML says: a machine's cores, which workers that compute at the same time share."""
    cores = os.cpu_count() or 1
    return settings.threads_per_worker or (
        max(1, cores // settings.num_workers) if isinstance(settings, RoleConfig) else cores
    )


def describe_plan(plans: Sequence[ProcessPlan]) -> str:
    """A table of processes and what each reserves."""
    rows = [f"{'processes':<40} {'workers':>7} {'cpus':>6} {'gpus':>6} {'threads':>7}"]
    for p in plans:
        where = "".join(f"  {name} {amount:g}" for name, amount in p.resources.items())
        where += f"  {p.placement}" if p.placement else ""
        rows.append(f"{' + '.join(p.roles):<40} {p.num_workers:>7} {p.cpus:>6g} {p.gpus:>6g} {p.threads:>7}{where}")
    asked = demand(plans)
    rows.append(f"{'total':<40} {sum(p.num_workers for p in plans):>7} {asked['CPU']:>6g} {asked['GPU']:>6g}")
    return "\n".join(rows)


def demand(plans: Sequence[ProcessPlan]) -> dict[str, float]:
    """What all processes reserve together, CPU and GPU first."""
    names = dict.fromkeys(["CPU", "GPU", *(name for plan in plans for name in plan.bundle)])
    return {name: round(sum(p.bundle.get(name, 0.0) * p.num_workers for p in plans), 6) for name in names}


def check_gpus(plans: Sequence[ProcessPlan], have: float) -> None:
    """Refuse before any actor starts when GPUs are asked for and there are too few."""
    asked = demand(plans)["GPU"]
    if asked > have:
        raise PlacementError(
            f"cluster: got a plan that asks for {asked:g} GPUs, expected at most the {have:g} that are here; "
            "use cluster/local.yaml, or join a cluster that has them"
        )


def check_cpus(plans: Sequence[ProcessPlan], have: float) -> None:
    """Refuse before any actor starts when more CPUs are reserved than this machine has."""
    asked = demand(plans)["CPU"]
    if asked > have:
        raise PlacementError(
            f"cluster: got CPU asked {asked:g} / have {have:g}, expected room for\n{describe_plan(plans)}\n"
            "lower num_workers or cpus_per_worker in the cluster YAML, or join a cluster that has them (RAY_ADDRESS)"
        )


def checkpoint_bytes(config: PpoRunConfig, num_parameters: int) -> int:
    """What the checkpoints that are kept, one more while it is written, and the finished model take on disk.

    Weights and the moments of what is trained; an adapter's part is left out, as are files that are small beside it.
    """
    adapters = (config.policy.adapter, config.critic.adapter)
    return _bytes_on_disk(config.model, adapters, config.run, num_parameters)


def learner_checkpoint_bytes(model: ModelConfig, adapter: AdapterConfig, run: RunConfig, num_parameters: int) -> int:
    """As `checkpoint_bytes`, of a run with a single learner, whose best step may be kept beside the newest ones."""
    return _bytes_on_disk(
        model, (adapter,), run.model_copy(update={"keep_checkpoints": run.keep_checkpoints + 1}), num_parameters
    )


def _bytes_on_disk(model: ModelConfig, adapters: Sequence[AdapterConfig], run: RunConfig, num_parameters: int) -> int:
    width = 4 if model.dtype == "float32" else 2
    master = 0 if width == 4 else 4
    trained = sum(not adapter.enabled for adapter in adapters)
    one = trained * num_parameters * (width + 8 + master)
    return (run.keep_checkpoints + 1) * one + num_parameters * width

"""Start the processes of a run, on Ray or in this one, and stop them."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping

from actors.handles import Group
from actors.local import LocalGroup
from actors.plan import check_gpus, plan_processes
from actors.worker import Actor
from alignment.config import ClusterConfig


@contextlib.contextmanager
def local_groups(actors: Mapping[str, Actor], cluster: ClusterConfig) -> Iterator[dict[str, Group]]:
    """Every role in this process; roles that the cluster YAML colocates share weights here too."""
    by_role: dict[str, Group] = {}
    for plan in plan_processes(cluster, tuple(actors)):
        group: Group = LocalGroup({role: actors[role] for role in plan.roles}, threads=plan.threads)
        by_role |= dict.fromkeys(plan.roles, group)
    with contextlib.ExitStack() as stack:
        for actor in actors.values():
            stack.callback(actor.close)
        for group in dict.fromkeys(by_role.values()):
            group.start().result()
        yield by_role


@contextlib.contextmanager
def ray_groups(actors: Mapping[str, Actor], cluster: ClusterConfig) -> Iterator[dict[str, Group]]:
    """Every colocated group as Ray processes inside one placement group; all are gone when the block ends."""
    import ray
    from ray.util.placement_group import remove_placement_group

    from actors.group import ActorGroup
    from actors.placement import reserve

    plans = plan_processes(cluster, tuple(actors))
    with session(), contextlib.ExitStack() as stack:
        check_gpus(plans, ray.cluster_resources().get("GPU", 0.0))
        placement, bundles = reserve(plans, timeout=cluster.placement_timeout)
        stack.callback(remove_placement_group, placement)
        groups: list[ActorGroup] = []
        for plan, indices in zip(plans, bundles, strict=True):
            group = ActorGroup(
                {role: actors[role] for role in plan.roles},
                num_workers=plan.num_workers,
                cpus_per_worker=plan.cpus,
                gpus_per_worker=plan.gpus,
                threads=plan.threads,
                takes_turns=plan.takes_turns,
                shares_memory=sum(other.num_workers for other in plans) > 1,
                placement=placement,
                bundles=indices,
            )
            stack.callback(group.stop)
            groups.append(group)
        for pending in [group.start() for group in groups]:
            pending.result()
        yield {role: group for group in groups for role in group.roles}


@contextlib.contextmanager
def session() -> Iterator[None]:
    """A connection to Ray for the time of the block; one that was there before is left open."""
    import ray

    started_here = connect()
    try:
        yield
    finally:
        if started_here:
            ray.shutdown()


def connect() -> bool:
    """Join the cluster that RAY_ADDRESS names (a submitted job has it set), else start a private one on loopback.

    True when started here. A cluster that merely runs on this machine is left alone: it may be another run's private
    one, and end with it.
    """
    import ray

    if ray.is_initialized():
        return False
    if "RAY_ADDRESS" in os.environ:
        ray.init(logging_level=logging.WARNING)
        print(f"joined the Ray cluster at {os.environ['RAY_ADDRESS']}", file=sys.stderr, flush=True)
        return False
    ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", logging_level=logging.WARNING)
    return True

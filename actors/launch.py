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
    """Join the Ray cluster of this job or machine, else start a private one on loopback. True when started here."""
    import ray

    if ray.is_initialized():
        return False
    # A worker imports our packages by the driver's path; bytecode and hub look-ups are no business of theirs.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        ray.init(address="auto", log_to_driver=True, logging_level=logging.WARNING)
        print("joined the running Ray cluster", file=sys.stderr, flush=True)
        return False
    except ConnectionError:
        ray.init(
            address="local",
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            log_to_driver=True,
            logging_level=logging.WARNING,
        )
        return True

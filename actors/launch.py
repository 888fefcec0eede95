"""Start the processes of a run, on Ray or in this one, and stop them."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator, Mapping

from actors.handles import Group
from actors.local import LocalGroup
from actors.plan import PlacementError, plan_processes
from actors.worker import Actor
from alignment.config import ClusterConfig

ANSWER_SECONDS = 3.0
"""How long a cluster has to take a connection: Ray itself would go on asking for minutes."""


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
    """Every colocated group as Ray processes in places reserved for them; all are gone when the block ends."""
    from actors.group import ActorGroup, EngineGroup
    from actors.object_store import Shelf
    from actors.placement import reserved

    plans = plan_processes(cluster, tuple(actors))
    with session(), contextlib.ExitStack() as stack:
        reservation = reserved(plans, placement=cluster.placement, timeout=cluster.placement_timeout)
        places = stack.enter_context(reservation)
        shelf, groups = Shelf(), list[ActorGroup]()
        for plan, own in zip(plans, places, strict=True):
            # An engine beside other roles cannot be started again without them.
            kind = EngineGroup if plan.roles == ("rollout",) else ActorGroup
            group = kind(
                {role: actors[role] for role in plan.roles},
                num_workers=plan.num_workers,
                cpus_per_worker=plan.cpus,
                gpus_per_worker=plan.gpus,
                threads=plan.threads,
                takes_turns=plan.takes_turns,
                shares_memory=sum(other.num_workers for other in plans) > 1,
                resources=plan.resources,
                places=own,
                shelf=shelf,
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
    one, and end with it. One that asks for no token is joined, with a warning: what is open there is open already.

    Raises:
        PlacementError: no cluster is there.
    """
    import ray

    if ray.is_initialized():
        return False
    address = os.environ.get("RAY_ADDRESS")
    if address is None or address.rpartition(":")[0] in ("127.0.0.1", "localhost"):
        stay_on_loopback()
    if address:
        check_address(address)
        try:
            ray.init(logging_level=logging.WARNING)
        except ConnectionError as error:
            raise PlacementError(_no_cluster(address, str(error).strip().splitlines()[0])) from error
        print(f"joined the Ray cluster at {address}", file=sys.stderr, flush=True)
        if warning := open_to_others(ray.get_runtime_context().gcs_address):
            print(warning, file=sys.stderr, flush=True)
        return False
    ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", logging_level=logging.WARNING)
    return True


def open_to_others(address: str) -> str | None:
    """What to say of a cluster at `address`, host:port, that other machines reach without a token; None of another.

    Ray puts RAY_AUTH_MODE into the environment of whoever joins with a token.
    """
    host = address.rpartition(":")[0].strip("[]")
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "token" or is_loopback(host):
        return None
    return (
        f"WARNING: joined {address} without a token: whoever reaches the ports of that cluster can run code on all "
        "its machines and read what this run reads and writes; start Ray there with RAY_AUTH_MODE=token, see "
        "cluster/README.md"
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def stay_on_loopback() -> None:
    """Let Ray's processes listen on 127.0.0.1 alone. A node address given to Ray does not: it is replaced by the
    machine's own, unless Ray is told that no other machine will ever join, as it assumes on Windows and macOS."""
    from ray._private import ray_constants

    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"  # for the processes that Ray starts
    ray_constants.ENABLE_RAY_CLUSTER = False


def check_address(address: str) -> None:
    """Refuse an address at which nobody answers. `auto` and `local`, which name no host, pass.

    Raises:
        PlacementError: no host and port, or no connection to them within 3 seconds.
    """
    if address in ("auto", "local"):
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (host and colon and port.isdecimal()) or "/" in host:
        raise PlacementError(_no_cluster(address, "no host:port"))
    # In a thread, because looking a name up knows no time limit.
    problems = [f"no answer within {ANSWER_SECONDS:g} s"]
    asking = threading.Thread(target=_ask, args=(host.strip("[]"), int(port), problems), daemon=True)
    asking.start()
    asking.join(ANSWER_SECONDS)
    if problem := problems[-1:]:
        raise PlacementError(_no_cluster(address, problem[0]))


def _ask(host: str, port: int, problems: list[str]) -> None:
    """Empty `problems` when a connection is taken; add what went wrong when it is not."""
    try:
        socket.create_connection((host, port), timeout=ANSWER_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        problems.append(str(error))
    else:
        problems.clear()


def _no_cluster(address: str, problem: str) -> str:
    return (
        f"RAY_ADDRESS: got {address!r} ({problem}), expected host:port of a running cluster, ray://host:port, auto or "
        "local; start the cluster, correct the address, or unset RAY_ADDRESS for a private one"
    )

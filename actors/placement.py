"""Reserve the machines that a cluster YAML asks for, and say meanwhile what is missing.

Processes with one strategy are one placement group, which Ray reserves whole or not at all. A role with a strategy of
its own is another group: a run that holds one and waits for another lets go of both after a moment, so that two runs
which hold what the other needs do not wait for each other for ever.
"""

from __future__ import annotations

import contextlib
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import ray
from ray._private.state import available_resources_per_node
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from actors.plan import PlacementError, ProcessPlan, demand
from alignment.config.cluster import Placement

Place = tuple[PlacementGroup, int]
"""A placement group and the index of a bundle in it."""

WAITING_LINE = 3.0
"""Seconds between two lines on what is missing."""
HOLD_SECONDS = (4.0, 8.0)
"""How long a part of the groups is held while others are missing: drawn anew each time, so that of two runs which
hold what the other needs one lets go first."""


@dataclass(slots=True)
class Request:
    """The processes of one placement group."""

    placement: Placement
    plans: list[ProcessPlan] = field(default_factory=list)
    group: PlacementGroup | None = None

    def ask(self) -> None:
        bundles = [plan.bundle for plan in self.plans for _ in range(plan.num_workers)]
        self.group = placement_group(bundles, strategy=self.placement.upper())

    def placed(self) -> bool:
        return self.group is not None and placement_group_table(self.group)["state"] == "CREATED"

    def wait(self, seconds: float) -> None:
        if self.group is not None:
            self.group.wait(timeout_seconds=seconds)

    def release(self) -> None:
        if self.group is not None:
            remove_placement_group(self.group)
            self.group = None

    def places(self) -> Iterator[tuple[ProcessPlan, list[Place]]]:
        """Of each plan, one for each process."""
        assert self.group is not None
        first = 0
        for plan in self.plans:
            yield plan, [(self.group, first + i) for i in range(plan.num_workers)]
            first += plan.num_workers


@contextlib.contextmanager
def reserved(
    plans: Sequence[ProcessPlan], *, placement: Placement = "pack", timeout: float
) -> Iterator[list[list[Place]]]:
    """Places for the processes of each plan, all of them or none, for the time of the block.

    Says every few seconds what is missing.

    Raises:
        PlacementError: not all had a place within `timeout` seconds.
    """
    requests = _requests(plans, placement)
    try:
        _wait_for_all(requests, plans, timeout)
        places = {plan.roles: own for request in requests for plan, own in request.places()}
        yield [places[plan.roles] for plan in plans]
    finally:
        for request in requests:
            request.release()


def _requests(plans: Sequence[ProcessPlan], placement: Placement) -> list[Request]:
    together = Request(placement, [plan for plan in plans if plan.placement is None])
    apart = [Request(plan.placement, [plan]) for plan in plans if plan.placement is not None]
    return [request for request in (together, *apart) if request.plans]


def _wait_for_all(requests: Sequence[Request], plans: Sequence[ProcessPlan], timeout: float) -> None:
    began = held = time.monotonic()
    hold = random.uniform(*HOLD_SECONDS)
    for request in requests:
        request.ask()
    while missing := [request for request in requests if not request.placed()]:
        missing[0].wait(min(WAITING_LINE, max(0.1, began + timeout - time.monotonic())))
        if missing[0].placed():
            continue
        now = time.monotonic()
        if now >= began + timeout:
            raise PlacementError(_not_placed(plans, requests, timeout))
        if len(missing) == len(requests):
            held = now
        elif now - held > hold:
            _start_over(requests)
            held, hold = time.monotonic(), random.uniform(*HOLD_SECONDS)
        _say(f"{_waiting(plans, requests)}, waiting {now - began:.0f} of {timeout:g} s, {_largest(plans, requests)}")


def _start_over(requests: Sequence[Request]) -> None:
    """Let another run have what this one holds, and ask again after a moment."""
    _say("placement: some roles have their places and others do not; letting go of all of them for a moment")
    for request in requests:
        request.release()
    time.sleep(random.uniform(0.0, WAITING_LINE))
    for request in requests:
        request.ask()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _waiting(plans: Sequence[ProcessPlan], requests: Sequence[Request]) -> str:
    """`free` counts what this run holds already: it is there for it."""
    asked, total, free = demand(plans), ray.cluster_resources(), ray.available_resources()
    held = demand([plan for request in requests if request.placed() for plan in request.plans])
    amounts = [
        f"{kind} asked {asked[kind]:g} / have {total.get(kind, 0):g} / free {free.get(kind, 0) + held.get(kind, 0):g}"
        for kind in asked
        if asked[kind] or total.get(kind)
    ]
    return f"placement: registered {len(_nodes())} nodes, " + ", ".join(amounts)


def _nodes() -> list[dict[str, float]]:
    """What each node has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _fits(bundle: Mapping[str, float], node: Mapping[str, float]) -> bool:
    return all(node.get(name, 0.0) >= amount - 1e-6 for name, amount in bundle.items())


def _room(plans: Sequence[ProcessPlan], requests: Sequence[Request]) -> dict[tuple[str, ...], int]:
    """For how many processes of each plan there is room, the largest being given theirs first."""
    free = [dict(node) for node in available_resources_per_node().values()]
    placed = {plan.roles for request in requests if request.placed() for plan in request.plans}
    room = {}
    for plan in sorted(plans, key=lambda plan: (-plan.gpus, -plan.cpus)):
        count = plan.num_workers if plan.roles in placed else 0
        for node in free:
            while count < plan.num_workers and _fits(plan.bundle, node):
                for name, amount in plan.bundle.items():
                    node[name] -= amount
                count += 1
        room[plan.roles] = count
    return room


def _largest(plans: Sequence[ProcessPlan], requests: Sequence[Request]) -> str:
    """The role with the most left to place."""
    room = _room(plans, requests)
    without = {plan.roles: plan.num_workers - room[plan.roles] for plan in plans}
    plan = max(plans, key=lambda plan: (without[plan.roles] * plan.gpus, without[plan.roles] * plan.cpus))
    if not without[plan.roles]:
        return "each worker would have room, but not as `placement` wants them"
    return f"largest missing: {' + '.join(plan.roles)} ({without[plan.roles]} of {plan.num_workers} workers)"


def _not_placed(plans: Sequence[ProcessPlan], requests: Sequence[Request], timeout: float) -> str:
    room, nodes = _room(plans, requests), _nodes()
    rows = [f"{'role':<40} {'workers':>7}  {'asked per worker':<24} placed"]
    impossible = False
    for plan in plans:
        asked = ", ".join(f"{name} {amount:g}" for name, amount in plan.bundle.items())
        verdict = "yes" if room[plan.roles] == plan.num_workers else f"room for {room[plan.roles]}"
        if not any(_fits(plan.bundle, node) for node in nodes):
            impossible = True
            most = ", ".join(f"{name} {max(node.get(name, 0.0) for node in nodes):g}" for name in plan.bundle)
            verdict = f"no node can hold one: the most that a node has is {most}"
        rows.append(f"{' + '.join(plan.roles):<40} {plan.num_workers:>7}  {asked:<24} {verdict}")
    waiting = [request for request in requests if request.placement == "strict_pack" and not request.placed()]
    for request in waiting:
        roles = ", ".join(" + ".join(plan.roles) for plan in request.plans)
        rows.append(f"strict_pack wants one node that holds all workers of {roles}")
    remedy = (
        "lower cpus_per_worker, gpus_per_worker or resources in the cluster YAML, or add nodes that have them (custom "
        "ones: ray start --resources)"
        if impossible
        else "lower num_workers, cpus_per_worker or gpus_per_worker in the cluster YAML, add nodes, or raise "
        "placement_timeout if some are still to join"
    )
    what = _waiting(plans, requests).replace("placement: ", "placement: got ")
    table = "\n".join(rows)
    return f"{what} after {timeout:g} s, {_largest(plans, requests)}; expected room for\n{table}\n{remedy}"

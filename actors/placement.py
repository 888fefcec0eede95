"""Reserve the machines that a cluster YAML asks for, or say asked / have within seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from actors.plan import PlacementError, ProcessPlan, demand, describe_plan


def reserve(plans: Sequence[ProcessPlan], *, timeout: float) -> tuple[PlacementGroup, list[list[int]]]:
    """One placement group for the whole run, and the bundle indices of each plan's workers.

    Says every few seconds what is asked and free, and gives up after `timeout` seconds with PlacementError.
    """
    bundles: list[dict[str, float]] = []
    indices: list[list[int]] = []
    for plan in plans:
        indices.append(list(range(len(bundles), len(bundles) + plan.num_workers)))
        bundle = {"CPU": plan.cpus} | ({"GPU": plan.gpus} if plan.gpus else {})
        bundles += [bundle] * plan.num_workers
    group = placement_group(bundles, strategy="PACK")
    deadline = time.monotonic() + timeout
    while not group.wait(timeout_seconds=min(5, max(0.1, deadline - time.monotonic()))):
        if time.monotonic() >= deadline:
            remove_placement_group(group)
            raise PlacementError(_not_placed(plans, timeout))
        print(f"waiting for machines: {_asked_and_have(plans)}", file=sys.stderr, flush=True)
    return group, indices


def _asked_and_have(plans: Sequence[ProcessPlan]) -> str:
    asked, total, free = demand(plans), ray.cluster_resources(), ray.available_resources()
    return ", ".join(
        f"{kind} asked {asked[kind]:g} / have {total.get(kind, 0):g} / free {_get(free, kind):g}"
        for kind in ("CPU", "GPU")
        if asked[kind] or total.get(kind)
    )


def _get(resources: Mapping[str, float], kind: str) -> float:
    return resources.get(kind, 0.0)


def _not_placed(plans: Sequence[ProcessPlan], timeout: float) -> str:
    return (
        f"placement: got {_asked_and_have(plans)} after {timeout:g} s, expected room for\n{describe_plan(plans)}\n"
        "lower num_workers, cpus_per_worker or gpus_per_worker in the cluster YAML, or add nodes"
    )

"""Reserving machines on real Ray with several nodes: strategies, pins, waiting for nodes that join, and giving up."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from actors.group import ActorGroup
from actors.placement import Place, reserved
from actors.plan import PlacementError, ProcessPlan, plan_processes
from actors.worker import Actor
from alignment.config import ClusterConfig

ROOT = Path(__file__).resolve().parents[2]


class Said(io.StringIO):
    """What is printed, and an event once it contains `word`."""

    def __init__(self, word: str) -> None:
        super().__init__()
        self.word, self.seen = word, threading.Event()

    def write(self, text: str) -> int:
        if self.word in text:
            self.seen.set()
        return super().write(text)


@pytest.fixture(scope="module")
def three_nodes() -> Iterator[Cluster]:
    """Ray with three nodes of 2 CPUs, of which one has gold; this process is its driver."""
    cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, "num_cpus": 2})
    try:
        cluster.add_node(num_cpus=2, resources={"gold": 4})
        cluster.add_node(num_cpus=2)
        ray.init(address=cluster.address, logging_level="warning")
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def plans_of(**cluster) -> list[ProcessPlan]:
    config = ClusterConfig.model_validate({"colocate": [], **cluster})
    return plan_processes(config, tuple(role for role in cluster if role != "colocate"))


def nodes_of(places: list[Place]) -> list[str]:
    return [placement_group_table(group)["bundles_to_node_id"][bundle] for group, bundle in places]


def everything_is_free() -> bool:
    """Ray gives reservations back a moment after they end."""
    group = placement_group([{"CPU": 2}] * 3, strategy="STRICT_SPREAD")
    try:
        return group.wait(20)
    finally:
        remove_placement_group(group)


def test_each_role_goes_to_nodes_as_its_placement_says(three_nodes):
    plans = plans_of(
        policy={"num_workers": 2, "cpus_per_worker": 0.5, "placement": "strict_pack"},
        critic={"num_workers": 2, "cpus_per_worker": 0.5},
        rollout={"num_engines": 3, "cpus_per_worker": 0.5, "placement": "spread"},
    )
    with reserved(plans, timeout=10) as (policy, critic, rollout):
        assert [len(set(nodes_of(places))) for places in (policy, critic, rollout)] == [1, 1, 3]
    with reserved(plans_of(critic={"num_workers": 3, "cpus_per_worker": 0.5}), placement="spread", timeout=10) as (
        one,
    ):
        assert len(set(nodes_of(one))) == 3
    assert everything_is_free()


class Where(Actor):
    role = "rollout"

    def setup(self, peers) -> None:
        pass

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()


def test_a_role_is_pinned_to_the_nodes_with_its_resource(three_nodes):
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    (gold,) = [node["NodeID"] for node in ray.nodes() if "gold" in node["Resources"]]
    pinned = {"num_engines": 2, "cpus_per_worker": 0.2, "resources": {"gold": 2}, "placement": "spread"}
    (plan,) = plans_of(rollout=pinned)
    with reserved([plan], timeout=10) as (places,):
        assert nodes_of(places) == [gold, gold], "although spread"
        settings = {"cpus_per_worker": plan.cpus, "resources": plan.resources}
        group = ActorGroup({"rollout": Where()}, num_workers=2, places=places, **settings)
        try:
            group.start().result()
            assert ray.get([worker.call.remote("rollout", "node") for worker in group.workers]) == [gold, gold]
        finally:
            group.stop()


def test_a_plan_without_room_is_given_up_with_a_table(three_nodes, capfd):
    plans = plans_of(
        policy={"num_workers": 2, "cpus_per_worker": 1},
        critic={"num_workers": 2, "cpus_per_worker": 2.5},
        rollout={"num_engines": 1, "resources": {"silver": 1}},
    )
    began = time.monotonic()
    with pytest.raises(PlacementError) as error, reserved(plans, timeout=4):
        pass
    assert 4 <= time.monotonic() - began < 9
    text = str(error.value)
    assert "got registered 3 nodes, CPU asked 7.2 / have 6 / free 6, GPU" not in text
    assert "got registered 3 nodes, CPU asked 7.2 / have 6 / free 6, silver asked 1 / have 0 / free 0" in text
    rows = {line.split()[0]: line for line in text.splitlines()}
    assert rows["policy"].split() == ["policy", "2", "CPU", "1", "yes"]
    assert rows["critic"].endswith("CPU 2.5                  no node can hold one: the most that a node has is CPU 2")
    assert "the most that a node has is CPU 2, silver 0" in rows["rollout"]
    assert "add nodes that have them" in text
    assert "largest missing: critic (2 of 2 workers)" in text
    assert "waiting 3 of 4 s, largest missing: critic" in capfd.readouterr().err
    assert everything_is_free()


def test_one_node_for_all_is_named_as_what_is_missing(three_nodes):
    plans = plans_of(policy={"num_workers": 3, "cpus_per_worker": 1, "placement": "strict_pack"})
    with (
        pytest.raises(PlacementError, match=r"policy +3  CPU 1 +yes\nstrict_pack wants one node .* workers of policy"),
        reserved(plans, timeout=1),
    ):
        pass


def test_two_runs_that_hold_what_the_other_needs_do_not_wait_for_ever(three_nodes, monkeypatch):
    """This run holds gold and waits for the CPUs of another one, which then asks for the gold."""
    others = [placement_group([{"CPU": 1.5}] * 3, strategy="STRICT_SPREAD")]
    assert others[0].wait(20)
    came_to: list[bool] = []
    said = Said("waiting 3 of")
    monkeypatch.setattr(sys, "stderr", said)

    def other_run() -> None:
        came_to.append(said.seen.wait(60))
        others.append(placement_group([{"gold": 4}]))
        came_to.append(others[1].wait(1))
        came_to.append(others[1].wait(60))
        for group in others:
            remove_placement_group(group)

    plans = plans_of(
        critic={"cpus_per_worker": 2},
        rollout={"cpus_per_worker": 0.1, "resources": {"gold": 4}, "placement": "pack"},
    )
    thread = threading.Thread(target=other_run)
    thread.start()
    with reserved(plans, timeout=240) as places:
        thread.join()
        assert came_to == [True, False, True], "it is held, and let go of"
        assert [len(own) for own in places] == [1, 1]
    assert "letting go of all of them for a moment" in said.getvalue()


def test_a_plan_is_placed_when_a_node_joins(three_nodes, monkeypatch):
    """No node can hold an engine of 4 CPUs until the run has said so and a larger one joins."""
    said = Said("largest missing: rollout (1 of 1 workers)")
    monkeypatch.setattr(sys, "stderr", said)
    plans = plans_of(critic={"num_workers": 2, "cpus_per_worker": 1}, rollout={"cpus_per_worker": 4})

    def nodes_of_engines() -> set[str]:
        with reserved(plans, timeout=600) as (_, rollout):
            return set(nodes_of(rollout))

    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(nodes_of_engines)
        assert said.seen.wait(60)
        joined = three_nodes.add_node(num_cpus=4)
        assert waiting.result(timeout=120) == {joined.node_id}
    assert "registered 3 nodes, CPU asked 6 / have 6 / free 6, waiting 3 of 600 s" in said.getvalue()
    three_nodes.remove_node(joined)


def test_the_recipe_refuses_at_once(three_nodes, tiny, tmp_path):
    """Within 30 seconds on a free machine; three times that where others use it too."""
    config, machines = tmp_path / "ppo.yaml", tmp_path / "cluster.yaml"
    config.write_text(
        f"""
run: {{num_steps: 2}}
data: {{source: {{path: {tiny}/prompts.jsonl}}, held_out: 4}}
model: {{path: {tiny}/policy}}
reward: {{model: {tiny}/reward}}
rollout: {{engine: transformers, max_new_tokens: 4}}
ppo: {{rollout_batch_size: 4, minibatch_size: 4}}
"""
    )
    machines.write_text("critic: {cpus_per_worker: 4}\n")
    given = ["--config", str(config), "--cluster", str(machines), "--output-dir", str(tmp_path / "run")]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "ppo_medical.py"), *given],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": three_nodes.address},
    )
    seconds = time.monotonic() - began
    assert done.returncode == 2, done.stderr[-3000:]
    assert "placement: got registered 3 nodes, CPU asked 4.8 / have 6 / free 6" in done.stderr
    assert "no node can hold one: the most that a node has is CPU 2" in done.stderr
    assert "largest missing: critic (1 of 1 workers)" in done.stderr
    assert "Traceback" not in done.stderr
    assert seconds < 90

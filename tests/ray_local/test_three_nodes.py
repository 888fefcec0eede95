"""The recipes on three Ray nodes, by editing the cluster YAML alone: the weights of one worker in one process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from many_nodes import LIST_ACTORS, largest_difference, nodes_of_actors, run, three_nodes, write_inputs
from safetensors.torch import load_file

# With 1, 2 and 2 CPUs, two of these learners fit on no one node.
TWO = """
policy: {num_workers: 2, cpus_per_worker: 1.1}
reference: {num_workers: 2, cpus_per_worker: 0.1}
critic: {num_workers: 2, cpus_per_worker: 0.4}
reward_model: {num_workers: 2, cpus_per_worker: 0.1}
rollout: {engine: transformers, num_engines: 2, cpus_per_worker: 0.2, threads_per_worker: 1}
"""
FOUR = """
policy: {num_workers: 4, cpus_per_worker: 0.6}
reference: {num_workers: 4, cpus_per_worker: 0.1}
critic: {num_workers: 4, cpus_per_worker: 0.2}
reward_model: {cpus_per_worker: 0.1}
rollout: {engine: transformers, num_engines: 2, cpus_per_worker: 0.2, threads_per_worker: 1}
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def cluster():
    with three_nodes() as environment:
        yield environment


def placed(cluster) -> dict[str, list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", LIST_ACTORS, cluster["DASHBOARD"]],
        env={**os.environ, **cluster},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return nodes_of_actors(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [2, 4])
def test_a_reward_model(inputs, cluster, tmp_path, num_workers):
    config, machines = inputs / "reward_model.yaml", tmp_path / "machines.yaml"
    cpus = {2: 1.1, 4: 0.9}[num_workers]  # no node has room for all
    machines.write_text(f"reward_model: {{num_workers: {num_workers}, cpus_per_worker: {cpus}}}\ncolocate: []\n")
    one = run("reward_model_medical", config, tmp_path / "one", "--local")
    many = run("reward_model_medical", config, tmp_path / "many", "--cluster", str(machines), environment=cluster)
    nodes = placed(cluster)
    assert [len(where) for where in nodes.values()] == [num_workers]
    assert len({node for where in nodes.values() for node in where}) >= 2
    assert largest_difference(many, one) < 1e-4


@pytest.fixture(scope="module")
def one_process(inputs, tmp_path_factory):
    return run("ppo_medical", inputs / "ppo.yaml", tmp_path_factory.mktemp("runs") / "one", "--local")


@pytest.mark.slow
@pytest.mark.parametrize(("machines", "ranks"), [(TWO, 2), (FOUR, 4)], ids=["two ranks", "four ranks"])
def test_ppo(inputs, cluster, one_process, tmp_path, machines, ranks):
    (tmp_path / "machines.yaml").write_text(machines)
    flags = ["--cluster", str(tmp_path / "machines.yaml")]
    many = run("ppo_medical", inputs / "ppo.yaml", tmp_path / "many", *flags, environment=cluster)
    nodes = placed(cluster)
    assert len(nodes["PolicyActor_ReferenceActor"]) == len(nodes["CriticActor"]) == ranks
    assert len(nodes["RolloutActor"]) == 2
    assert len(set(nodes["PolicyActor_ReferenceActor"])) >= 2
    start = load_file(str(inputs / "policy" / "model.safetensors"))
    moved = load_file(str(one_process / "final" / "model.safetensors"))
    assert max(float((moved[name] - start[name]).abs().max()) for name in start) > 1e-3
    assert largest_difference(many, one_process) < 1e-4

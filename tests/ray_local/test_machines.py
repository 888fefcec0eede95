"""Three machines with addresses of their own and a fourth outside that submits: what only a network can break."""

from __future__ import annotations

import os
import secrets

import pytest
from machines import Machine, machines, reason_to_skip
from many_nodes import (
    LIST_ACTORS,
    PYTHON_FIRST,
    ROOT,
    TIMEOUT,
    largest_difference,
    nodes_of_actors,
    run,
    write_inputs,
)

pytestmark = pytest.mark.slow
# With 1, 2 and 2 CPUs, two of these learners fit on no one machine.
MACHINES = """
policy: {num_workers: 2, cpus_per_worker: 1.1}
reference: {num_workers: 2, cpus_per_worker: 0.1}
critic: {num_workers: 2, cpus_per_worker: 0.4}
reward_model: {cpus_per_worker: 0.1}
rollout: {engine: transformers, num_engines: 2, cpus_per_worker: 0.3, threads_per_worker: 1}
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    (folder / "machines.yaml").write_text(MACHINES)
    return folder


@pytest.fixture(scope="module")
def environment(inputs):
    """Of a shell on any of the machines: with the token, without the variables that point at this checkout."""
    token = inputs / "token"
    token.write_text(secrets.token_hex(16))
    token.chmod(0o600)
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH"))}
    return {**ours, "PATH": PYTHON_FIRST, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


@pytest.fixture(scope="module")
def cluster(environment):
    """The head, two workers, and a machine that is none of the cluster's."""
    if reason := reason_to_skip():
        pytest.skip(reason)
    with machines(4) as (head, *workers, outside):
        store = ["--object-store-memory", "80000000"]
        commands = [(head, ["head", head.address, "--num-cpus", "1"])]
        commands += [(one, ["worker", head.address, one.address, "--num-cpus", "2"]) for one in workers]
        for machine, arguments in commands:
            start = ["cluster/launch/node.sh", *arguments, *store]
            done = machine.run(start, environment, cwd=ROOT, timeout=120)
            assert done.returncode == 0, done.stderr[-2000:]
        yield head, *workers, outside
    assert not any(machine.processes() for machine in (head, *workers, outside))


def submission(head: Machine, inputs, output, *flags: str) -> list[str]:
    return [
        *("ray", "job", "submit", "--address", f"http://{head.address}:8265", "--working-dir", "."),
        *("--runtime-env", "cluster/runtime_env.yaml", "--", "python", "recipes/ppo_medical.py"),
        *("--config", str(inputs / "ppo.yaml"), "--cluster", str(inputs / "machines.yaml")),
        *("--output-dir", str(output), *flags),
    ]


def test_without_the_token_nothing_is_taken(cluster, inputs, environment, tmp_path):
    head, *_, outside = cluster
    anonymous = {name: value for name, value in environment.items() if not name.startswith("RAY_AUTH")}
    anonymous["HOME"] = str(tmp_path)  # Ray looks for a token there
    refused = outside.run(submission(head, inputs, tmp_path / "run"), anonymous, cwd=ROOT, timeout=TIMEOUT)
    assert refused.returncode != 0
    assert "Unauthorized: Missing authentication token" in refused.stderr
    jobs = f"http://{head.address}:8265/api/jobs/"
    code = f"import urllib.request as r\ntry: r.urlopen({jobs!r}, timeout=20)\nexcept OSError as e: print(e.code)"
    asked = outside.run(["python", "-c", code], anonymous, cwd=ROOT, timeout=60)
    assert asked.stdout.strip() == "401", asked.stderr
    wrong = {**environment, "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    assert outside.run(submission(head, inputs, tmp_path / "run"), wrong, cwd=ROOT, timeout=TIMEOUT).returncode != 0
    assert not (tmp_path / "run").exists()


def test_a_job_from_outside_has_the_weights_of_one_process(cluster, inputs, environment, tmp_path):
    head, *_, outside = cluster
    one = run("ppo_medical", inputs / "ppo.yaml", tmp_path / "one", "--local")
    job = submission(head, inputs, tmp_path / "many")
    done = outside.run(job, environment, cwd=ROOT, timeout=TIMEOUT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "succeeded" in done.stdout
    assert f"joined the Ray cluster at {head.address}:6379" in done.stdout
    assert "WARNING: joined" not in done.stdout
    listed = head.run(["python", "-c", LIST_ACTORS, f"http://{head.address}:8265"], environment, cwd=ROOT, timeout=60)
    nodes = nodes_of_actors(listed.stdout)
    assert len(set(nodes["PolicyActor_ReferenceActor"])) == 2, "the ranks share a machine: nothing crossed the network"
    assert len(nodes["CriticActor"]) == len(nodes["RolloutActor"]) == 2
    assert largest_difference(tmp_path / "many", one) < 1e-4


def test_joining_a_cluster_that_asks_for_no_token_is_loud(environment, tmp_path):
    if reason := reason_to_skip():
        pytest.skip(reason)
    anonymous = {name: value for name, value in environment.items() if not name.startswith("RAY_AUTH")}
    anonymous |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    with machines(1) as (head,):
        start = ["ray", "start", "--head", "--node-ip-address", head.address, "--include-dashboard", "false"]
        done = head.run([*start, "--object-store-memory", "80000000"], anonymous, cwd=ROOT, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        join = ["python", "-c", "from actors.launch import connect; connect()"]
        joined = head.run(join, {**anonymous, "RAY_ADDRESS": f"{head.address}:6379"}, cwd=ROOT, timeout=120)
    assert joined.returncode == 0, joined.stderr[-2000:]
    assert f"WARNING: joined {head.address}:6379 without a token" in joined.stderr

"""Runs of the recipes on several machines: small inputs, three Ray nodes here, and where the actors lived."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file
from tiny import write_prompts, write_tiny_model, write_tiny_reward_model

ROOT = Path(__file__).resolve().parents[1]
PYTHON_FIRST = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
"""A PATH whose `python` and `ray` are the ones that run the tests."""
TIMEOUT = 400


def write_inputs(folder: Path) -> Path:
    """`ppo.yaml` and `reward_model.yaml` with all that they read."""
    write_tiny_model(folder / "policy")
    write_tiny_reward_model(folder / "reward")
    write_prompts(folder / "prompts.jsonl")
    pairs = [{"prompt": f"What about {i}?", "chosen": "Rest." * (1 + i % 4), "rejected": "No!"} for i in range(24)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "ppo.yaml").write_text(
        f"""
run: {{num_steps: 2}}
data: {{source: {{path: {folder}/prompts.jsonl}}, held_out: 4}}
model: {{path: {folder}/policy}}
reward: {{model: {folder}/reward, missing_eos_penalty: 0.5}}
rollout: {{engine: transformers, max_new_tokens: 8}}
policy: {{micro_batch_size: 1, optimizer: {{lr: 1.0e-3}}}}
critic: {{micro_batch_size: 1, optimizer: {{lr: 1.0e-3}}}}
ppo: {{rollout_batch_size: 8, minibatch_size: 4, ppo_epochs: 2}}
"""
    )
    (folder / "reward_model.yaml").write_text(
        f"""
run: {{num_steps: 3, checkpoint_every: 3}}
data: {{source: {{path: {folder}/pairs.jsonl}}, held_out: 6}}
model: {{path: {folder}/policy}}
training: {{batch_size: 8, micro_batch_size: 1, optimizer: {{lr: 1.0e-3}}}}
"""
    )
    return folder


def run(recipe: str, config: Path, output: Path, *flags: str, environment: Mapping[str, str] | None = None) -> Path:
    """The run directory of a recipe that ended well."""
    done = subprocess.run(
        [sys.executable, f"recipes/{recipe}.py", "--config", str(config), "--output-dir", str(output), *flags],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return output


def largest_difference(ours: Path, theirs: Path) -> float:
    """Between the final weights of two runs."""
    ours_by_name, theirs_by_name = (load_file(path / "final" / "model.safetensors") for path in (ours, theirs))
    assert ours_by_name.keys() == theirs_by_name.keys()
    return max(float((ours_by_name[name] - theirs_by_name[name]).abs().max()) for name in ours_by_name)


LIST_ACTORS = """
import json, sys
from ray.util.state import list_actors
print(json.dumps([[one.class_name, one.node_id, one.job_id] for one in list_actors(address=sys.argv[1], limit=1000)]))
"""


def nodes_of_actors(answer: str) -> dict[str, list[str]]:
    """Of the newest job: the node of each process, by the roles in it, from what LIST_ACTORS printed."""
    found = json.loads(answer.splitlines()[-1])
    newest = max(job for _, _, job in found)
    nodes = defaultdict(list)
    for roles, node, job in found:
        if job == newest:
            nodes[roles].append(node)
    return dict(nodes)


@contextmanager
def three_nodes(cpus: Sequence[int] = (1, 2, 2)) -> Iterator[dict[str, str]]:
    """Three Ray nodes that listen on loopback, the first of them the head: the environment that joins them."""
    folder = tempfile.mkdtemp(prefix="rl", dir="/tmp")
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_TMPDIR": folder,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": PYTHON_FIRST,
    }
    nodes = subprocess.Popen(
        [sys.executable, __file__, *map(str, cpus)],
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert nodes.stdin is not None
    assert nodes.stdout is not None
    try:
        addresses = next((line for line in nodes.stdout if line.startswith("ready ")), None)
        assert addresses is not None, "the nodes did not start"
        _, address, dashboard = addresses.split()
        yield {**environment, "RAY_ADDRESS": address, "DASHBOARD": f"http://{dashboard}"}
    finally:
        nodes.stdin.close()
        try:
            nodes.wait(timeout=60)
        finally:
            nodes.kill()
            shutil.rmtree(folder, ignore_errors=True)


def _hold(cpus: Sequence[int]) -> None:
    """Start the nodes, say where, and stop them when nobody listens any more."""
    from ray.cluster_utils import Cluster

    common = {"object_store_memory": 80_000_000, "node_ip_address": "127.0.0.1"}
    head = {**common, "num_cpus": cpus[0], "include_dashboard": True, "dashboard_port": 0}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for count in cpus[1:]:
        cluster.add_node(num_cpus=count, **common)
    try:
        cluster.wait_for_nodes()
        print("ready", cluster.address, cluster.head_node.webui_url, flush=True)
        sys.stdin.read()
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    _hold([int(count) for count in sys.argv[1:]])

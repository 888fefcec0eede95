"""Models split over workers, by editing the cluster YAML alone: the weights of one process."""

from __future__ import annotations

import pytest
from many_nodes import largest_difference, run, write_inputs
from safetensors.torch import load_file

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow

EVERY_MODEL_IN_PARTS = """
policy: {num_workers: 2, zero_stage: 3}
reference: {num_workers: 2, zero_stage: 3}
critic: {num_workers: 2, engine: deepspeed, zero_stage: 3, cpus_per_worker: 0.1}
reward_model: {num_workers: 2, zero_stage: 3}
rollout: {engine: transformers, num_engines: 2, threads_per_worker: 1}
"""
ONE_WORKER_WITH_MOMENTS_IN_HOST_MEMORY = """
policy: {engine: deepspeed, zero_stage: 2, offload: optimizer}
critic: {num_workers: 2, zero_stage: 2, cpus_per_worker: 0.1}
rollout: {engine: transformers}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("split"))


@pytest.mark.parametrize(
    ("cluster", "flags"),
    [
        (EVERY_MODEL_IN_PARTS, []),
        (EVERY_MODEL_IN_PARTS, ["--policy.adapter.r", "4"]),
        (ONE_WORKER_WITH_MOMENTS_IN_HOST_MEMORY, []),
    ],
    ids=["in parts, full", "in parts, LoRA", "in host memory"],
)
def test_ppo_with_models_in_parts(folder, tmp_path, cluster, flags):
    (tmp_path / "cluster.yaml").write_text(cluster)
    one = run("ppo_medical", folder / "ppo.yaml", tmp_path / "one", "--local", *flags)
    machines = ["--cluster", str(tmp_path / "cluster.yaml")]
    many = run("ppo_medical", folder / "ppo.yaml", tmp_path / "many", *machines, *flags)
    start, trained = (load_file(path / "model.safetensors") for path in (folder / "policy", one / "final"))
    matrix = "model.layers.1.mlp.up_proj.weight"
    assert (trained[matrix] - start[matrix]).abs().max() > 1e-4
    assert largest_difference(many, one) < 1e-4

"""`cluster/launch/slurm.sbatch` on two machines with addresses of their own: Ray, the run and its end are real."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from machines import Machine, machines, reason_to_skip
from many_nodes import PYTHON_FIRST, ROOT, TIMEOUT, largest_difference, run, write_inputs

pytestmark = pytest.mark.slow
# Slurm's own programs, as far as the script uses them: where a step runs is in the variable with the machine's name.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do [[ $1 != --nodelist=* ]] || node=${1#--nodelist=}; shift; done
echo "$node" >> "$STEPS"
exec ip netns exec "${!node}" "$@"
"""
SCONTROL = """#!/usr/bin/env bash
[[ "$1 $2 $3" == "show hostnames node[1-2]" ]] && printf 'node1\\nnode2\\n'
"""
MACHINES = """
policy: {num_workers: 2, cpus_per_worker: 1.1}
reference: {num_workers: 2, cpus_per_worker: 0.1}
rollout: {engine: transformers, num_engines: 2, cpus_per_worker: 0.1, threads_per_worker: 1}
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    (folder / "machines.yaml").write_text(MACHINES)
    return folder


@pytest.fixture(scope="module")
def nodes():
    if reason := reason_to_skip():
        pytest.skip(reason)
    with machines(2) as both:
        yield both


@pytest.fixture
def job(nodes, tmp_path):
    """The environment of a batch script on the first of two machines. Afterwards nothing of it is left."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    yield {
        **ours,
        "PATH": f"{programs}:{PYTHON_FIRST}",
        "HOME": str(tmp_path),
        "STEPS": str(tmp_path / "steps"),
        "RAY_TMPDIR": str(nodes[0].folder),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_CPUS_PER_TASK": "2",
        "node1": nodes[0].namespace,
        "node2": nodes[1].namespace,
    }
    ended = [machine.ends(30) for machine in nodes]
    for machine in nodes:
        machine.stop()
    assert ended == [True, True]
    assert list((tmp_path / ".ray").iterdir()) == [], "the token is still there"


def batch(job, nodes: list[Machine], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        nodes[0].command(["bash", str(ROOT / "cluster" / "launch" / "slurm.sbatch"), *arguments]),
        env=job,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def recipe(inputs: Path, output: Path, *flags: str) -> list[str]:
    given = ["--config", str(inputs / "ppo.yaml"), "--cluster", str(inputs / "machines.yaml")]
    return ["recipes/ppo_medical.py", *given, "--output-dir", str(output), *flags]


def test_a_run_on_two_machines(job, nodes, inputs, tmp_path):
    one = run("ppo_medical", inputs / "ppo.yaml", tmp_path / "one", "--local")
    script = batch(job, nodes, *recipe(inputs, tmp_path / "many"))
    said, _ = script.communicate(timeout=TIMEOUT)
    assert script.returncode == 0, said[-4000:]
    assert "2 of 2 machines are there" in said
    assert f"joined the Ray cluster at {nodes[0].address}:" in said
    # Its address, the head, whether it is there; then, side by side, the worker and whether both are; the run.
    steps = Path(job["STEPS"]).read_text().split()
    assert [steps[:3], sorted(steps[3:5]), steps[5:]] == [["node1"] * 3, ["node1", "node2"], ["node1"]]
    assert largest_difference(tmp_path / "many", one) < 1e-4


def test_a_run_that_is_refused(job, nodes, inputs, tmp_path):
    script = batch(job, nodes, *recipe(inputs, tmp_path / "run", "--ppo.clip_ratio", "7"))
    said, _ = script.communicate(timeout=TIMEOUT)
    assert script.returncode == 2
    assert "ppo.clip_ratio" in said


def test_a_job_that_slurm_ends(job, nodes, inputs, tmp_path):
    script = batch(job, nodes, *recipe(inputs, tmp_path / "run", "--run.num_steps", "500"))
    deadline = time.monotonic() + TIMEOUT
    while not (tmp_path / "run" / "checkpoints" / "step_000001").is_dir():
        assert script.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    script.send_signal(signal.SIGTERM)
    said, _ = script.communicate(timeout=TIMEOUT)
    assert script.returncode == 143, said[-3000:]
    assert "continue with --resume auto" in said


def test_a_machine_that_does_not_come(job, nodes, inputs, tmp_path):
    """Its Ray ends at once: so does the job, long before the time to wait is over."""
    stand_in = tmp_path / "bin" / "srun"
    stand_in.write_text(SRUN.replace("exec ip", '[ "$2" != worker ] || exit 3\nexec ip'))
    began = time.monotonic()
    script = batch(job, nodes, *recipe(inputs, tmp_path / "run"))
    said, _ = script.communicate(timeout=TIMEOUT)
    assert script.returncode == 1
    assert time.monotonic() - began < 300
    assert "joined the Ray cluster" not in said

"""The files in `cluster/`: each is read by what will read it, and asks for the machines that it claims."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv

from actors.plan import ProcessPlan, demand, plan_processes
from alignment.config import ClusterConfig
from alignment.config_io import load_config

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "cluster" / "launch"
GPUS_PER_MACHINE = 8


def plans(name: str) -> list[ProcessPlan]:
    return plan_processes(load_config(ClusterConfig, file=ROOT / "cluster" / name))


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((LAUNCH / name).read_text()))


@pytest.mark.parametrize("path", sorted((ROOT / "cluster").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_file_is_yaml_without_a_secret(path):
    assert all(document for document in yaml.safe_load_all(path.read_text()))
    assert not re.search(r"(?i)(password|api_key|auth_token)\s*[:=]\s*['\"]?[A-Za-z0-9+/]{8,}", path.read_text())


# one_gpu.yaml: roles that take turns on a fifth of one GPU each, with a fifth to spare.
@pytest.mark.parametrize(
    ("name", "gpus"), [("local.yaml", 0), ("one_process.yaml", 0), ("one_gpu.yaml", 0.8), ("one_node.yaml", 8)]
)
def test_what_one_machine_has_is_enough(name, gpus):
    assert demand(plans(name))["GPU"] == gpus
    assert demand(plans(name))["CPU"] <= (1 if gpus < 1 else 16)


def fits(gpus_of_processes: list[float], machines: int) -> bool:
    """Whether all have a place: the largest first, each on the fullest machine that has room."""
    free = [float(GPUS_PER_MACHINE)] * machines
    for gpus in sorted(gpus_of_processes, reverse=True):
        with_room = [i for i, left in enumerate(free) if left >= gpus]
        if not with_room:
            return False
        free[min(with_room, key=free.__getitem__)] -= gpus
    return True


def test_eight_machines_of_eight_gpus_are_used_whole():
    """Every process has all its GPUs on one machine, and none is left over."""
    asked = [plan.gpus for plan in plans("multi_node.yaml") for _ in range(plan.num_workers)]
    assert sum(asked) == 8 * GPUS_PER_MACHINE == demand(plans("multi_node.yaml"))["GPU"]
    assert fits(asked, 8)
    assert not fits(asked, 7)


@pytest.mark.parametrize("name", ["one_gpu.yaml", "one_node.yaml", "multi_node.yaml"])
def test_the_policy_and_its_reference_share_gpus(name):
    assert [plan.num_workers for plan in plans(name) if plan.roles == ("policy", "reference")] != []


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = group["template"]["spec"]["containers"]
    return only


class TestKubernetes:
    @pytest.fixture
    def job(self) -> dict[str, Any]:
        (job,) = [document for document in documents("rayjob.yaml") if document["kind"] == "RayJob"]
        return job

    @pytest.fixture
    def groups(self, job) -> list[dict[str, Any]]:
        spec = job["spec"]["rayClusterSpec"]
        return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]

    def test_keys_are_those_of_kuberay(self, job, groups):
        assert (job["apiVersion"], set(job)) == ("ray.io/v1", {"apiVersion", "kind", "metadata", "spec"})
        known = {"entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit"}
        assert set(job["spec"]) == known | {"submitterPodTemplate", "rayClusterSpec"}
        cluster = job["spec"]["rayClusterSpec"]
        assert set(cluster) == {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
        assert set(groups[0]) == {"rayStartParams", "template"}
        named = {"groupName", "replicas", "minReplicas", "maxReplicas"}
        assert [set(group) for group in groups[1:]] == [{"rayStartParams", "template"} | named]
        assert all(isinstance(value, str) for group in groups for value in group["rayStartParams"].values())

    def test_kubernetes_accepts_every_object_and_pod(self, job, groups):
        kubernetes_validate = pytest.importorskip("kubernetes_validate")
        own = [document for document in documents("rayjob.yaml") if document["kind"] != "RayJob"]
        templates = [group["template"] for group in groups] + [job["spec"]["submitterPodTemplate"]]
        pods = [{"apiVersion": "v1", "kind": "Pod", **template} for template in templates]
        assert len(own) == 2
        assert len(pods) == 3
        for one in [*own, *pods]:
            kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)

    def test_a_token_from_a_secret_and_no_privileges(self, job, groups):
        auth = job["spec"]["rayClusterSpec"]["authOptions"]
        assert auth == {"mode": "token", "secretName": "raylign-ray-token"}
        templates = [group["template"] for group in groups] + [job["spec"]["submitterPodTemplate"]]
        for spec in (template["spec"] for template in templates):
            assert spec["securityContext"]["runAsNonRoot"] is True
            assert spec["securityContext"]["runAsUser"] > 0
            assert spec["automountServiceAccountToken"] is False
            assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
            for one in spec["containers"]:
                assert one["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
                assert not {env["name"] for env in one.get("env", [])} & {"RAY_AUTH_TOKEN", "RAY_AUTH_MODE"}
            assert not [volume for volume in spec.get("volumes", []) if "hostPath" in volume]

    def test_the_machines_have_what_the_cluster_yaml_asks_for(self, job, groups):
        head, workers = groups
        assert head["rayStartParams"] == {"num-cpus": "0"}
        flags = shlex.split(job["spec"]["entrypoint"])
        asked = demand(plans(Path(flags[flags.index("--cluster") + 1]).name))
        limits = container(workers)["resources"]["limits"]
        assert workers["replicas"] * int(limits["nvidia.com/gpu"]) == asked["GPU"]
        assert workers["replicas"] * int(limits["cpu"]) >= asked["CPU"]
        assert workers["minReplicas"] == workers["maxReplicas"] == workers["replicas"]
        for group in groups:
            resources = container(group)["resources"]
            assert resources["requests"] == resources["limits"]

    def test_every_machine_sees_the_run(self, job, groups):
        flags = shlex.split(job["spec"]["entrypoint"])
        output = Path(flags[flags.index("--output-dir") + 1])
        (claim,) = [one for one in documents("rayjob.yaml") if one["kind"] == "PersistentVolumeClaim"]
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
        for group in groups:
            mounts = {mount["name"]: mount["mountPath"] for mount in container(group)["volumeMounts"]}
            volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
            assert set(mounts) == set(volumes)
            assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
            assert output.is_relative_to(mounts["shared"])


class TestRayUp:
    @pytest.fixture(params=["aws.yaml", "gcp.yaml"])
    def config(self, request) -> dict[str, Any]:
        (config,) = documents(request.param)
        return config

    def test_ray_accepts_it(self, config):
        prepared = prepare_config(config)
        validate_config(prepared)
        assert prepared["provider"]["type"] in ("aws", "gcp")

    def test_its_machines_are_those_of_the_cluster_yaml(self, config):
        types = config["available_node_types"]
        gpus = types["gpus"]
        assert gpus["min_workers"] == gpus["max_workers"] == config["max_workers"] == 8
        asked = demand(plans("multi_node.yaml"))
        assert gpus["min_workers"] * gpus["resources"]["GPU"] == asked["GPU"]
        assert gpus["min_workers"] * gpus["resources"]["CPU"] >= asked["CPU"]
        assert types[config["head_node_type"]]["resources"] == {"CPU": 0}

    def test_ray_asks_for_the_token_and_shows_its_dashboard_to_nobody(self, config):
        assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
        assert any("chmod 600 ~/.ray/auth_token" in one for one in config["setup_commands"])
        starts = [
            one
            for key in ("head_start_ray_commands", "worker_start_ray_commands")
            for one in config[key]
            if "ray start" in one
        ]
        assert len(starts) == 2
        for one in starts:
            assert "RAY_AUTH_MODE=token" in one
            assert one.startswith("cd ~/raylign && ")
        assert "--dashboard-host=127.0.0.1" in starts[0]
        assert "--num-cpus=0" in starts[0]


def instructions() -> Iterator[tuple[str, str]]:
    """Of the Dockerfile: name and rest, continued lines joined."""
    text = re.sub(r"\\\n", " ", (ROOT / "cluster" / "Dockerfile").read_text())
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, rest = line.partition(" ")
            yield name, rest


def test_the_image_runs_jobs_in_the_checkout_and_not_as_root():
    steps = list(instructions())
    (base,) = [rest for name, rest in steps if name == "FROM"]
    assert re.fullmatch(r"python:3\.1\d\.\d+-slim-\w+", base), "a tag that does not move"
    (workdir,) = [rest for name, rest in steps if name == "WORKDIR"]
    (user,) = [rest for name, rest in steps if name == "USER"]
    assert user == "1000"
    copies = [i for i, (name, _) in enumerate(steps) if name == "COPY"]
    assert [steps[i][1].split()[-2:] for i in copies] == [["pyproject.toml", "./"], [".", "."]]
    installs = [i for i, (name, rest) in enumerate(steps) if name == "RUN" and "pip install" in rest]
    # Dependencies between the two, so that another commit does not install them again.
    assert copies[0] < installs[0] < copies[1] < installs[1]
    places = {name: i for i, (name, _) in enumerate(steps)}
    assert places["USER"] < places["WORKDIR"] < copies[0]
    assert workdir == "/opt/raylign"
    assert not [rest for name, rest in steps if name in ("ADD", "ENTRYPOINT") or "TOKEN=" in rest or "SECRET" in rest]


def test_the_requirements_of_the_image_are_those_of_the_project():
    """The program in the Dockerfile, run."""
    (step,) = [rest for name, rest in instructions() if name == "RUN" and "tomllib" in rest]
    program = re.search(r'python -c "(.*?)" \$EXTRAS', step, re.S)
    assert program is not None
    done = subprocess.run(
        [sys.executable, "-c", program.group(1), "vllm", "qlora"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("vllm==")]
    assert [line for line in lines if line.startswith("bitsandbytes")]
    assert [line for line in lines if line.startswith("ray[default]>=")]


def test_what_is_uploaded_with_a_job(tmp_path):
    """Ray's own packing of a checkout with everything in it that should stay at home."""
    checkout = tmp_path / "checkout"
    kept = [
        "recipes/ppo_medical.py",
        "cluster/local.yaml",
        "alignment/data/runs.py",
        "recipes/configs/ppo_medical.yaml",
    ]
    left = [
        *(".git/config", ".venv/lib/big.so", "runs/ppo_medical/final/model.safetensors", ".ruff_cache/x"),
        *(
            "actors/__pycache__/launch.cpython-311.pyc",
            ".mypy_cache/x",
            ".pytest_cache/x",
            "raylign.egg-info/PKG-INFO",
        ),
        *("build/lib/x.py", "dist/raylign.whl", ".ray/auth_token"),
    ]
    for name in [*kept, *left]:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("x")
    environment = yaml.safe_load((ROOT / "cluster" / "runtime_env.yaml").read_text())
    accepted = RuntimeEnv(working_dir=str(checkout), **environment)
    assert accepted["excludes"] == environment["excludes"]
    package = tmp_path / "package.zip"
    create_package(
        str(checkout), package, include_gitignore=False, include_parent_dir=False, excludes=accepted["excludes"]
    )
    packed = [name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")]
    assert sorted(packed) == sorted(kept)
    for name, value in environment["env_vars"].items():
        assert not re.search("TOKEN$|SECRET|KEY|PASSWORD", name)
        assert value in ("0", "1", "true", "false")


class TestOneMachine:
    """`node.sh` refuses before it starts anything."""

    @pytest.fixture
    def home(self, tmp_path) -> Path:
        (tmp_path / ".ray").mkdir()
        token = tmp_path / ".ray" / "auth_token"
        token.write_text("0" * 64)
        token.chmod(0o600)
        return tmp_path

    def start(self, home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """As far as Ray's own look at its flags, of which it is given one that it does not know."""
        shell = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return subprocess.run(
            [str(LAUNCH / "node.sh"), *arguments, "--no-such-flag"],
            env={**shell, "HOME": str(home), "PATH": f"{Path(sys.executable).parent}:{shell['PATH']}", **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )

    @pytest.mark.parametrize("arguments", [["head", "10.0.0.1"], ["worker", "10.0.0.1"], ["worker", "h", "10.0.0.2"]])
    def test_a_token_lets_ray_start(self, home, arguments):
        done = self.start(home, *arguments)
        assert "No such option" in done.stderr, done.stderr
        assert "--no-such-flag" in done.stderr

    @pytest.mark.parametrize("arguments", [["head", "10.0.0.1"], ["worker", "10.0.0.1"]])
    def test_no_token(self, home, arguments):
        (home / ".ray" / "auth_token").unlink()
        done = self.start(home, *arguments)
        assert done.returncode == 2
        assert "got no token in" in done.stderr
        assert "make ray-token" in done.stderr
        assert "No such option" in self.start(home, *arguments, RAY_AUTH_TOKEN="0" * 64).stderr

    def test_an_empty_token(self, home):
        (home / ".ray" / "auth_token").write_text("")
        assert self.start(home, "head", "10.0.0.1").returncode == 2

    def test_a_token_that_others_can_read(self, home):
        (home / ".ray" / "auth_token").chmod(0o640)
        done = self.start(home, "head", "10.0.0.1")
        assert done.returncode == 2
        assert "expected mode 0600; chmod 600" in done.stderr

    def test_authentication_switched_off(self, home):
        done = self.start(home, "head", "10.0.0.1", RAY_AUTH_MODE="disabled")
        assert done.returncode == 2
        assert "got RAY_AUTH_MODE=disabled, expected token" in done.stderr

    @pytest.mark.parametrize(
        ("arguments", "got"),
        [
            ([], "got role ''"),
            (["leader", "10.0.0.1"], "got role 'leader'"),
            (["head"], "got address '--no-such-flag'"),
            (["head", ""], "got address ''"),
            (["worker", "10.0.0.1:6379"], "got address '10.0.0.1:6379'"),
            (["worker", "http://10.0.0.1"], "got address 'http://10.0.0.1'"),
        ],
    )
    def test_what_is_no_machine(self, home, arguments, got):
        done = (
            self.start(home, *arguments)
            if arguments
            else subprocess.run([str(LAUNCH / "node.sh")], capture_output=True, text=True, timeout=60)
        )
        assert done.returncode == 2
        assert got in done.stderr


@pytest.mark.parametrize("name", ["node.sh", "slurm.sbatch"])
def test_shell_files_are_bash(name):
    assert subprocess.run(["bash", "-n", str(LAUNCH / name)], capture_output=True, text=True).stderr == ""
    assert (LAUNCH / name).read_text().startswith("#!/usr/bin/env bash\n")

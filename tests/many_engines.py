"""Runs of PPO on N rollout engines whose processes can be killed on command.

Faults are planted for one process: a file of its name tells it where to kill itself with SIGKILL.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import ray

from actors.build import ppo_actors, ppo_roles
from actors.handles import RolloutHandle
from actors.launch import ray_groups
from actors.rollout import RolloutActor
from alignment.config import ClusterConfig, PpoRunConfig
from alignment.data.chat import load_tokenizer
from alignment.data.prompts import load_prompts
from alignment.loops.ppo import PpoState, train_ppo
from alignment.loops.run import Run
from alignment.run_directory import RunDirectory
from alignment.types import Prompt

# The processes cannot import a module of the tests.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

NUM_ENGINES = 3
MIXED = [Prompt(id=f"p{i}", messages=(), prompt_ids=tuple(range(4, 4 + 3 + 37 * i % 101))) for i in range(11)]
"""Prompts of 3 to 100 tokens."""


class FaultyRollout(RolloutActor):
    """The engine's actor, with places where its process dies or damages what it got, when told to."""

    faults: Path

    def setup(self, peers):
        if self.rank and (self.faults / "no second engine").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        super().setup(peers)
        self.forwards = 0
        if self.engine_kind == "transformers":
            self.engine.model.model.register_forward_hook(self.after_forward)
        else:
            engine = self.engine.llm.llm_engine
            step = engine.step

            def counted() -> list:
                self.after_forward()
                return step()

            engine.step = counted

    def told(self, what: str) -> bool:
        return (self.faults / f"{what}-{os.getpid()}").exists()

    def after_forward(self, *_):
        self.forwards += 1
        if self.forwards == 5 and self.told("die while it samples"):
            os.kill(os.getpid(), signal.SIGKILL)

    def generate(self, prompts, **settings):
        self.forwards = 0
        with (self.faults / "calls").open("a") as file:
            file.write(f"{len(prompts)}\n")
        rollouts = super().generate(prompts, **settings)
        if self.told("die after the next share"):
            self.faults.joinpath(f"die while it samples-{os.getpid()}").touch()
        if (self.faults / "all die").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return rollouts

    def receive_bucket(self, bucket):
        if self.told("die while it receives"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.told("damage"):
            payload = bucket.payload.copy()
            payload[len(payload) // 2] ^= 1
            bucket = dataclasses.replace(bucket, payload=payload)
        super().receive_bucket(bucket)


@dataclasses.dataclass
class Started:
    """Running processes, and where faults are planted for them."""

    config: PpoRunConfig
    groups: dict
    faults: Path
    prompts: list[Prompt]

    @property
    def engines(self):
        return self.groups["rollout"]

    def pid(self, rank: int) -> int:
        return ray.get(self.engines.workers[rank].pid.remote())

    def plant(self, what: str, rank: int) -> None:
        (self.faults / f"{what}-{self.pid(rank)}").touch()

    def kill(self, rank: int) -> None:
        os.kill(self.pid(rank), signal.SIGKILL)

    def handle(self, count: int = NUM_ENGINES) -> RolloutHandle:
        """A handle on the first `count` engines."""
        some = copy.copy(self.engines)
        some.workers, some.num_workers = self.engines.workers[:count], count
        return RolloutHandle(some)


@contextlib.contextmanager
def started_engines(config: PpoRunConfig, faults: Path, num_engines: int = NUM_ENGINES) -> Iterator[Started]:
    """Engines with a thread each, and one process for the other roles."""
    cluster = ClusterConfig.model_validate(
        {
            "rollout": {"num_engines": num_engines, "threads_per_worker": 1},
            "colocate": [["policy", "reference", "critic", "reward_model"]],
        }
    )
    actors = ppo_actors(config, cluster, model_path=config.model.path, critic_path=config.model.path)
    actors["rollout"].__class__ = FaultyRollout
    actors["rollout"].faults = faults
    prompts = load_prompts(config.data, load_tokenizer(config.model.path)).train
    with ray_groups(actors, cluster) as groups:
        yield Started(config, groups, faults, list(prompts))


class Training:
    """A run of `train_ppo` with fresh models in the processes that are there."""

    def __init__(
        self,
        started: Started,
        folder: Path,
        *,
        num_steps: int = 3,
        engine_limits: tuple[int, int] | None = None,
    ) -> None:
        for pending in [group.start() for group in dict.fromkeys(started.groups.values())]:
            pending.result()
        self.started, self.folder = started, folder
        self.roles = ppo_roles(started.groups, engine_limits=engine_limits)
        self.num_steps = num_steps
        self.state = PpoState.start(started.config)
        self.run = Run(
            RunDirectory(folder / "run"), num_steps=num_steps, checkpoint_every=num_steps, keep_checkpoints=1
        )

    def up_to(self, num_steps: int) -> None:
        run = self.started.config.run.model_copy(update={"num_steps": num_steps})
        roles = {name: getattr(self.roles, name) for name in ("policy", "critic", "reference", "reward", "rollout")}
        config = self.started.config.model_copy(update={"run": run})
        train_ppo(config, self.started.prompts, run=self.run, state=self.state, **roles)

    def end(self) -> dict[str, bytes]:
        """Every file with trained numbers, and every sample."""
        self.up_to(self.num_steps)
        self.run.close()
        files = [*self.run.store.folder.rglob("*.safetensors"), *self.run.store.folder.rglob("*.pt")]
        assert len(files) == 4
        files.append(self.run.directory.path / "rollouts.jsonl")
        return {file.relative_to(self.folder).as_posix(): file.read_bytes() for file in files}

    def metrics(self, name: str) -> list[float]:
        rows = (self.run.directory.path / "metrics.jsonl").read_text().splitlines()
        return [json.loads(row)[name] for row in rows]

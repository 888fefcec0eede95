"""Supervised runs of tiny models in this process."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import torch

from actors.build import sft_actors, sft_role
from actors.launch import local_groups
from alignment.config import ClusterConfig, SftRunConfig
from alignment.loops.offline import SftState, train_sft
from alignment.loops.run import Run
from alignment.run_directory import RunDirectory
from alignment.types import SftExample


def examples_of(count: int, seed: int = 0, *, longest: int = 24, words: int = 200) -> list[SftExample]:
    """Random tokens in four quarters, of which the second and the fourth are the assistant's."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        length = int(torch.randint(8, longest, (1,), generator=generator))
        ids = tuple(torch.randint(3, words, (length,), generator=generator).tolist())
        mask = tuple(4 * t // length % 2 == 1 for t in range(length))
        made.append(SftExample(id=f"{seed}/{i}", input_ids=ids, response_mask=mask))
    return made


class Few:
    """The same few examples again and again, validated on others."""

    def __init__(self, train: list[SftExample], held_out: list[SftExample]) -> None:
        self.train, self.held_out = train, held_out

    def batch(self, step: int, batch_size: int) -> list[SftExample]:
        return [self.train[(step * batch_size + i) % len(self.train)] for i in range(batch_size)]


class Supervised:
    """A run of `train_sft`, to be cut and taken up again."""

    def __init__(self, model: Path, folder: Path, data: Few, *, run: dict | None = None, **training) -> None:
        self.config = SftRunConfig.model_validate(
            {
                "run": {"num_steps": 8, "trackers": [], "keep_checkpoints": 1, **(run or {})},
                "model": {"path": str(model)},
                "training": {"batch_size": 4, **training},
            }
        )
        self.data, self.folder, self.state = data, folder, SftState()
        self.stack = contextlib.ExitStack()
        actors = sft_actors(self.config, ClusterConfig(), model_path=str(model))
        self.policy = sft_role(self.stack.enter_context(local_groups(actors, ClusterConfig())))
        own = self.config.run
        self.run = Run(
            RunDirectory(folder),
            num_steps=own.num_steps,
            checkpoint_every=own.checkpoint_every,
            keep_checkpoints=own.keep_checkpoints,
            trackers=(),
        )

    def train(self, *, patience: float = float("inf"), num_steps: int | None = None) -> None:
        run = self.config.run.model_copy(update={"num_steps": num_steps or self.config.run.num_steps})
        config = self.config.model_copy(update={"run": run})
        train_sft(config, self.data, policy=self.policy, run=self.run, state=self.state, patience=patience)

    def resume(self) -> None:
        found, _ = self.run.store.latest_valid()
        assert found is not None
        self.state = SftState(**self.run.restore(found, {"policy": self.policy}))

    def weights(self) -> dict[str, torch.Tensor]:
        (actor,) = self.policy.group.host.actors.values()
        return {name: p.detach().clone() for name, p in actor.model.named_parameters()}

    def metrics(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

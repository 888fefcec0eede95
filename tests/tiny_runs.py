"""Runs on examples of tiny models in this process, to be cut and taken up again."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from actors.launch import local_groups
from alignment.config import ClusterConfig
from alignment.loops.offline import SftState
from alignment.loops.run import Run
from alignment.run_directory import RunDirectory

DEFAULTS = {"num_steps": 8, "trackers": [], "keep_checkpoints": 1}


def settings_of(model: Path, run: dict | None, training: dict) -> dict:
    """A config with few steps and small batches."""
    return {
        "run": {**DEFAULTS, **(run or {})},
        "model": {"path": str(model)},
        "training": {"batch_size": 4, **training},
    }


class TinyRun:
    """What every such run has; a kind of run says how it trains.

    Attributes:
        part: the role's name in a checkpoint.
        role: set by the kind of run, from `groups`.
    """

    part: str
    role: Any

    def __init__(self, config: Any, actors: Mapping[str, Any], folder: Path, data: Any) -> None:
        self.config, self.data, self.folder, self.state = config, data, folder, SftState()
        self.stack = contextlib.ExitStack()
        self.groups = self.stack.enter_context(local_groups(actors, ClusterConfig()))
        own = config.run
        self.run = Run(
            RunDirectory(folder),
            num_steps=own.num_steps,
            checkpoint_every=own.checkpoint_every,
            keep_checkpoints=own.keep_checkpoints,
            trackers=(),
        )

    def train(self, *, patience: float = float("inf"), num_steps: int | None = None) -> None:
        raise NotImplementedError

    def cut_to(self, num_steps: int | None) -> Any:
        """The config of a run that ends after so many steps; its own where none is named."""
        run = self.config.run.model_copy(update={"num_steps": num_steps or self.config.run.num_steps})
        return self.config.model_copy(update={"run": run})

    def resume(self) -> None:
        found, _ = self.run.store.latest_valid()
        assert found is not None
        self.state = SftState(**self.run.restore(found, {self.part: self.role}))

    def weights(self) -> dict[str, torch.Tensor]:
        (actor,) = self.role.group.host.actors.values()
        return {name: p.detach().clone() for name, p in actor.model.named_parameters()}

    def metrics(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


def untimed(run: TinyRun) -> list[dict]:
    """The metrics that do not depend on the clock."""
    return [{name: v for name, v in row.items() if not name.startswith("timing/")} for row in run.metrics()]


def cut_and_resumed(whole: TinyRun, cut: TinyRun, again: TinyRun, *, at: int) -> list[dict]:
    """Metrics of a run that went through, after it was seen that one cut and taken up `again` comes to the same end.

    State, weights and metrics are compared, bit for bit. `cut` and `again` share a folder.
    """
    with whole.stack, cut.stack, again.stack:
        whole.train()
        cut.train(num_steps=at)
        again.resume()
        assert again.state == cut.state
        assert again.state.step == at
        again.train()
        assert again.state == whole.state
        expected = whole.weights()
        assert all(torch.equal(p, expected[name]) for name, p in again.weights().items())
    rows = untimed(whole)
    assert untimed(again) == rows
    return rows

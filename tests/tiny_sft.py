"""Supervised runs of tiny models in this process."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_runs import TinyRun, settings_of

from actors.build import sft_actors, sft_role
from alignment.config import ClusterConfig, SftRunConfig
from alignment.loops.offline import train_sft
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


class Supervised(TinyRun):
    """A run of `train_sft`."""

    part = "policy"

    def __init__(self, model: Path, folder: Path, data: Few, *, run: dict | None = None, **training) -> None:
        config = SftRunConfig.model_validate(settings_of(model, run, training))
        super().__init__(config, sft_actors(config, ClusterConfig(), model_path=str(model)), folder, data)
        self.role = sft_role(self.groups)

    def train(self, *, patience: float = float("inf"), num_steps: int | None = None) -> None:
        config = self.cut_to(num_steps)
        train_sft(config, self.data, policy=self.role, run=self.run, state=self.state, patience=patience)

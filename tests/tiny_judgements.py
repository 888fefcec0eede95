"""Judgements that a tiny model can learn: token 11 is good, 12 is worse, 13 is the worst."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import torch

from actors.build import reward_training_actors, reward_training_role
from actors.launch import local_groups
from actors.reward_training import objectives_of
from alignment import models
from alignment.config import ClusterConfig, RewardModelRunConfig
from alignment.engines.torch import TorchEngine
from alignment.judgements import LabelledAnswer, Ranking, RatedAnswer, SteppedAnswer
from alignment.learners.reward_model import RewardModelLearner
from alignment.loops.offline import SftState, train_reward_model
from alignment.loops.run import Run
from alignment.packing import MicroBatchLimit
from alignment.reward_objectives import Objectives
from alignment.run_directory import RunDirectory
from alignment.types import PreferencePair

GOOD, WORSE, WORST = 11, 12, 13
RATINGS = {GOOD: 0.9, WORSE: 0.5, WORST: 0.1}


def judgements_of(kind, count, seed=5):
    generator = torch.Generator().manual_seed(seed)

    def ids(low, high):
        length = int(torch.randint(low, high, (1,), generator=generator))
        return tuple(torch.randint(20, 200, (length,), generator=generator).tolist())

    def one_of(*choices):
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    made = []
    for i in range(count):
        common = {"id": f"{kind}/{i}", "prompt_ids": ids(2, 6), "source": f"s{i % 2}"}
        if kind == "pairs":
            body = ids(1, 6)
            made.append(PreferencePair(**common, chosen_ids=(*body, GOOD), rejected_ids=(*ids(1, 6), WORST)))
        elif kind == "rankings":
            ends = (GOOD, WORSE, WORST) if i % 3 else (GOOD, WORST)
            answers = tuple((*ids(1, 6), end) for end in ends)
            made.append(Ranking(**common, answer_ids=answers, ranks=tuple(range(1, len(ends) + 1))))
        elif kind == "ratings":
            end = one_of(GOOD, WORSE, WORST)
            answer = (*ids(1, 6), end)
            made.append(RatedAnswer(**common, answer_ids=answer, target=RATINGS[end], agreement=one_of(1.0, 0.6)))
        elif kind == "labels":
            end = one_of(GOOD, WORST)
            made.append(LabelledAnswer(**common, answer_ids=(*ids(1, 6), end), target=float(end == GOOD)))
        else:
            ends = [one_of(GOOD, WORST) for _ in range(1 + i % 3)]
            answer, step_ends = (), []
            for end in ends:
                answer = (*answer, *ids(1, 4), end)
                step_ends.append(len(answer) - 1)
            targets = tuple(float(end == GOOD) for end in ends)
            made.append(SteppedAnswer(**common, answer_ids=answer, step_ends=tuple(step_ends), targets=targets))
    return made


def reward_learner(folder, *, rows=4, lr=3e-3, layout="padded", **objectives):
    model = models.load_scalar_model(str(folder), head="random", seed=0, layout=layout)
    engine = TorchEngine(model.named_parameters(), lr=lr, total_updates=60, max_grad_norm=1e9)
    limit = MicroBatchLimit(rows=rows, layout=model.layout)
    return RewardModelLearner(model, engine, micro_batch_limit=limit, objectives=Objectives(**objectives))


class Data:
    def __init__(self, train, held_out) -> None:
        self.train, self.held_out = train, held_out


class RewardRun:
    """A run of `train_reward_model`, to be cut and taken up again."""

    def __init__(self, model: Path, folder: Path, data: Data, *, run: dict | None = None, **training) -> None:
        self.config = RewardModelRunConfig.model_validate(
            {
                "run": {"num_steps": 8, "trackers": [], "keep_checkpoints": 1, **(run or {})},
                "model": {"path": str(model)},
                "training": {"batch_size": 4, **training},
            }
        )
        self.data, self.folder, self.state = data, folder, SftState()
        self.stack = contextlib.ExitStack()
        actors = reward_training_actors(self.config, ClusterConfig(), model_path=str(model))
        self.role = reward_training_role(self.stack.enter_context(local_groups(actors, ClusterConfig())))
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
        train_reward_model(
            self.config.model_copy(update={"run": run}),
            self.data,
            reward_model=self.role,
            run=self.run,
            state=self.state,
            objectives=objectives_of(self.config.training),
            patience=patience,
        )

    def resume(self) -> None:
        found, _ = self.run.store.latest_valid()
        assert found is not None
        self.state = SftState(**self.run.restore(found, {"reward_model": self.role}))

    def weights(self) -> dict[str, torch.Tensor]:
        (actor,) = self.role.group.host.actors.values()
        return {name: p.detach().clone() for name, p in actor.model.named_parameters()}

    def metrics(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

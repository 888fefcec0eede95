"""Judgements that a tiny model can learn: token 11 is good, 12 is worse, 13 is the worst."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_runs import TinyRun, settings_of

from actors.build import reward_training_actors, reward_training_role
from actors.reward_training import objectives_of
from alignment import models
from alignment.config import ClusterConfig, RewardModelRunConfig
from alignment.engines.torch import TorchEngine
from alignment.judgements import LabelledAnswer, Ranking, RatedAnswer, SteppedAnswer
from alignment.learners.reward_model import RewardModelLearner
from alignment.loops.offline import train_reward_model
from alignment.packing import MicroBatchLimit
from alignment.reward_objectives import Objectives
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


class RewardRun(TinyRun):
    """A run of `train_reward_model`."""

    part = "reward_model"

    def __init__(self, model: Path, folder: Path, data: Data, *, run: dict | None = None, **training) -> None:
        config = RewardModelRunConfig.model_validate(settings_of(model, run, training))
        super().__init__(config, reward_training_actors(config, ClusterConfig(), model_path=str(model)), folder, data)
        self.role = reward_training_role(self.groups)

    def train(self, *, patience: float = float("inf"), num_steps: int | None = None) -> None:
        train_reward_model(
            self.cut_to(num_steps),
            self.data,
            reward_model=self.role,
            run=self.run,
            state=self.state,
            objectives=objectives_of(self.config.training),
            patience=patience,
        )

"""Offline loops: the data is there before the run. One function per kind of stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from alignment.batching import minibatches
from alignment.config import RewardModelRunConfig
from alignment.interfaces import Metrics, Pending, Saves
from alignment.loops.run import Run
from alignment.types import PreferencePair


class RewardTrainer(Saves, Protocol):
    """A reward model that learns from pairs."""

    def update(self, pairs: Sequence[PreferencePair], *, step: int) -> Pending[Metrics]: ...
    def score_pairs(self, pairs: Sequence[PreferencePair]) -> Pending[list[tuple[float, float]]]: ...


def pairs_for_step(pairs: Sequence[PreferencePair], step: int, *, batch_size: int, seed: int) -> list[PreferencePair]:
    """The batch of a step, a pure function of it: epochs are permutations and a batch may span two of them."""
    first = step * batch_size
    picked: list[PreferencePair] = []
    while len(picked) < batch_size:
        epoch, offset = divmod(first + len(picked), len(pairs))
        _, order = next(minibatches(len(pairs), len(pairs), epochs=1, seed=seed, step=epoch))
        picked += [pairs[i] for i in order[offset : offset + batch_size - len(picked)].tolist()]
    return picked


def train_reward_model(
    config: RewardModelRunConfig,
    pairs: Sequence[PreferencePair],
    *,
    reward_model: RewardTrainer,
    run: Run,
    first_step: int = 0,
) -> None:
    """Bradley-Terry on batches of pairs."""
    for step in range(first_step, config.run.num_steps):
        log = run.begin_step(step)
        batch = pairs_for_step(pairs, step, batch_size=config.training.batch_size, seed=config.run.seed)
        with log.phase("update"):
            log.metrics.update(reward_model.update(batch, step=step).result())
        run.finish_step(log)
        run.checkpoint(step + 1, {"reward_model": reward_model}, {"step": step + 1})


def pair_report(scores: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Held-out accuracy with its 95 % Wilson interval, the mean margin, and the accuracies of single pairs."""
    correct = [float(chosen > rejected) for chosen, rejected in scores]
    n, p = len(correct), sum(correct) / len(correct)
    z = 1.959964
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * ((p * (1 - p) + z * z / (4 * n)) / n) ** 0.5 / (1 + z * z / n)
    margins = torch.tensor([chosen - rejected for chosen, rejected in scores])
    return {
        "accuracy": p,
        "accuracy_ci95": [centre - half, centre + half],
        "margin": float(margins.mean()),
        "n": n,
        "correct": correct,
    }

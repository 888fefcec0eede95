"""Offline loops: the data is there before the run. One function per kind of stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from alignment.batching import minibatches
from alignment.bootstrap import paired_bootstrap
from alignment.config import RewardModelRunConfig, SftRunConfig
from alignment.interfaces import Metrics, Pending, Saves
from alignment.loops.run import Run
from alignment.types import PreferencePair, SftExample


class RewardTrainer(Saves, Protocol):
    """A reward model that learns from pairs."""

    def update(self, pairs: Sequence[PreferencePair], *, step: int) -> Pending[Metrics]: ...
    def score_pairs(self, pairs: Sequence[PreferencePair]) -> Pending[list[tuple[float, float]]]: ...


class SftTrainer(Saves, Protocol):
    """A language model that learns from examples."""

    def update(self, examples: Sequence[SftExample], *, step: int) -> Pending[Metrics]: ...
    def nll(self, examples: Sequence[SftExample]) -> Pending[list[float]]: ...


class Batches(Protocol):
    """Examples to learn from and to validate on."""

    @property
    def held_out(self) -> Sequence[SftExample]: ...

    def batch(self, step: int, batch_size: int) -> Sequence[SftExample]:
        """The examples of a step, a pure function of it."""
        ...


@dataclass(kw_only=True)
class SftState:
    """Where a supervised run stands: what its checkpoints remember of the loop."""

    step: int = 0
    """Completed steps."""
    best_loss: float = math.inf
    """Lowest validation loss so far."""
    best_step: int | None = None
    """The step after which it was seen; its checkpoint is kept."""
    worse_in_a_row: int = 0
    """Validations since then."""

    def judge(self, loss: float) -> None:
        """Take in a validation after `step` steps."""
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.worse_in_a_row = loss, self.step, 0
        else:
            self.worse_in_a_row += 1


def train_sft(
    config: SftRunConfig, examples: Batches, *, policy: SftTrainer, run: Run, state: SftState, patience: float
) -> None:
    """Cross-entropy on batches of examples, until the steps are done or validations have stopped getting better."""
    training, num_steps = config.training, config.run.num_steps
    while state.step < num_steps and state.worse_in_a_row < patience:
        log = run.begin_step(state.step)
        batch = examples.batch(state.step, training.batch_size)
        with log.phase("update"):
            log.metrics.update(policy.update(batch, step=state.step).result())
        state.step += 1
        if training.validate_every and (state.step % training.validate_every == 0 or state.step == num_steps):
            with log.phase("validate"):
                log.metrics.update(validation(policy.nll(examples.held_out).result(), examples.held_out))
            state.judge(log.metrics["validation/loss"])
        run.finish_step(log)
        last = state.step == num_steps or state.worse_in_a_row >= patience
        run.checkpoint(
            state.step,
            {"policy": policy},
            asdict(state),
            due=last or state.best_step == state.step,
            pinned=state.best_step,
        )


def take_best(policy: SftTrainer, run: Run, state: SftState) -> int:
    """Put back the step whose validation was the best, if it is not the last one. Returns the step that is there now:
    the last one where the best one's checkpoint is damaged, which is said."""
    if state.best_step is None or state.best_step == state.step:
        return state.step
    if reason := run.store.verify(state.best_step):
        run.progress.message(
            f"validation was best after step {state.best_step}, whose checkpoint is not used: {reason}"
        )
        return state.step
    run.progress.message(f"validation was best after step {state.best_step}: taking that model")
    policy.load(run.store.step_folder(state.best_step) / "policy").result()
    return state.best_step


def validation(sums: Sequence[float], examples: Sequence[SftExample]) -> dict[str, float]:
    """Loss per trained token in nats, and perplexity, from the examples' summed negative log-likelihoods."""
    loss = math.fsum(sums) / sum(example.num_trained for example in examples)
    return {"validation/loss": loss, "validation/perplexity": math.exp(min(loss, 700.0))}


def loss_report(
    before: Sequence[float], after: Sequence[float], examples: Sequence[SftExample], seed: int
) -> dict[str, Any]:
    """One row of `held_out`: loss per token, whose interval resamples examples with the tokens they have."""
    # Shares of the loss per token: their mean is that loss.
    scale = len(examples) / sum(example.num_trained for example in examples)
    _, low, high = paired_bootstrap([scale * s for s in before], [scale * s for s in after], seed=seed)
    return {
        "before": scale * math.fsum(before) / len(examples),
        "after": scale * math.fsum(after) / len(examples),
        "n": len(examples),
        "gain_ci95": [low, high],
        "higher_is_better": False,
    }


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
    margins = torch.tensor([chosen - rejected for chosen, rejected in scores])
    report = accuracy_report([float(chosen > rejected) for chosen, rejected in scores])
    return {**report, "margin": float(margins.mean())}


def accuracy_report(correct: Sequence[float]) -> dict[str, Any]:
    """Share of items that are right (1, not 0) with its 95 % Wilson interval (Wilson 1927), and the items."""
    n, p = len(correct), sum(correct) / len(correct)
    z = 1.959964
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * ((p * (1 - p) + z * z / (4 * n)) / n) ** 0.5 / (1 + z * z / n)
    return {"accuracy": p, "accuracy_ci95": [centre - half, centre + half], "n": n, "correct": list(correct)}

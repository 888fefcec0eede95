"""Offline loops: the data is there before the run. One function per kind of stage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

from alignment.batching import minibatches
from alignment.bootstrap import paired_bootstrap
from alignment.config import RewardModelRunConfig, SftRunConfig
from alignment.interfaces import Metrics, Pending, Saves
from alignment.judgements import Judgement
from alignment.loops.run import Run, StepLog
from alignment.reward_objectives import Objectives, held_out_loss
from alignment.types import SftExample

T = TypeVar("T")


class RewardTrainer(Saves, Protocol):
    """A reward model that learns from judgements of answers."""

    def update(self, records: Sequence[Judgement], *, step: int) -> Pending[Metrics]: ...
    def scores(self, records: Sequence[Judgement]) -> Pending[list[tuple[float, ...]]]: ...


class Judgements(Protocol):
    """Records to learn from and to validate on, of one kind."""

    @property
    def train(self) -> Sequence[Judgement]: ...
    @property
    def held_out(self) -> Sequence[Judgement]: ...


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
    """Where an offline run stands: what its checkpoints remember of the loop."""

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
        if validation_is_due(training.validate_every, state.step, num_steps):
            with log.phase("validate"):
                log.metrics.update(validation(policy.nll(examples.held_out).result(), examples.held_out))
            state.judge(log.metrics["validation/loss"])
        end_step(run, log, state, {"policy": policy}, num_steps=num_steps, patience=patience)


def validation_is_due(validate_every: int, step: int, num_steps: int) -> bool:
    """After `step` steps: the last one is validated whatever the interval. 0 validates none."""
    return validate_every > 0 and (step % validate_every == 0 or step == num_steps)


def end_step(
    run: Run, log: StepLog, state: SftState, parts: Mapping[str, Saves], *, num_steps: int, patience: float
) -> None:
    """Write down a step, and commit what is due: the last one and the best one always are."""
    run.finish_step(log)
    last = state.step == num_steps or state.worse_in_a_row >= patience
    due = last or state.best_step == state.step
    run.checkpoint(state.step, parts, asdict(state), due=due, pinned=state.best_step)


def take_best(learner: Saves, run: Run, state: SftState, *, part: str = "policy") -> int:
    """Put back the step whose validation was the best, if it is not the last one. Returns the step that is there now:
    the last one where the best one's checkpoint is damaged, which is said. `part`: the learner's name in it."""
    if state.best_step is None or state.best_step == state.step:
        return state.step
    if reason := run.store.verify(state.best_step):
        run.progress.message(
            f"validation was best after step {state.best_step}, whose checkpoint is not used: {reason}"
        )
        return state.step
    run.progress.message(f"validation was best after step {state.best_step}: taking that model")
    learner.load(run.store.step_folder(state.best_step) / part).result()
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


def rows_for_step(rows: Sequence[T], step: int, *, batch_size: int, seed: int) -> list[T]:
    """The batch of a step, a pure function of it: epochs are permutations and a batch may span two of them."""
    first = step * batch_size
    picked: list[T] = []
    while len(picked) < batch_size:
        epoch, offset = divmod(first + len(picked), len(rows))
        _, order = next(minibatches(len(rows), len(rows), epochs=1, seed=seed, step=epoch))
        picked += [rows[i] for i in order[offset : offset + batch_size - len(picked)].tolist()]
    return picked


def train_reward_model(
    config: RewardModelRunConfig,
    judgements: Judgements,
    *,
    reward_model: RewardTrainer,
    run: Run,
    state: SftState,
    objectives: Objectives,
    patience: float,
) -> None:
    """Batches of judgements, until the steps are done or validations have stopped getting better."""
    training, num_steps, held_out = config.training, config.run.num_steps, judgements.held_out
    while state.step < num_steps and state.worse_in_a_row < patience:
        log = run.begin_step(state.step)
        batch = rows_for_step(judgements.train, state.step, batch_size=training.batch_size, seed=config.run.seed)
        with log.phase("update"):
            log.metrics.update(reward_model.update(batch, step=state.step).result())
        state.step += 1
        if validation_is_due(training.validate_every, state.step, num_steps):
            with log.phase("validate"):
                log.metrics.update(held_out_loss(objectives, held_out, reward_model.scores(held_out).result()))
            state.judge(log.metrics["validation/loss"])
        end_step(run, log, state, {"reward_model": reward_model}, num_steps=num_steps, patience=patience)


def accuracy_report(correct: Sequence[float]) -> dict[str, Any]:
    """Share of items that are right (1, not 0) with its 95 % Wilson interval (Wilson 1927), and the items."""
    n, p = len(correct), sum(correct) / len(correct)
    z = 1.959964
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * ((p * (1 - p) + z * z / (4 * n)) / n) ** 0.5 / (1 + z * z / n)
    return {"accuracy": p, "accuracy_ci95": [centre - half, centre + half], "n": n, "correct": list(correct)}

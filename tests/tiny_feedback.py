"""A tiny policy that learns from a feedback log, and is stopped at a named point: `python tiny_feedback.py` is one
that kills itself there."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tiny_preferences import LIMIT, dpo_learner, loaded

from actors.loading import load_trained, save_trained
from actors.local import Done
from alignment.data.chat import load_tokenizer
from alignment.data.feedback_pairs import FeedbackPairs
from alignment.data.movielens import prompt_of
from alignment.feedback_log import FeedbackConsumer, FeedbackEvent, FeedbackLog, event_of
from alignment.learners.dpo import pair_logps
from alignment.loops.online_feedback import FeedbackState, learn_from_feedback
from alignment.loops.run import Run
from alignment.run_directory import RunDirectory

FILMS = {str(i): f"Film {i}" for i in range(20)}
POINTS = ("take", "reference", "updated", "saving", "saved")
"""Where a run may be stopped, in the order of a step."""

Fault = Callable[[str, int], None]


class KilledError(BaseException):
    """Stops everything, as a signal would."""


def killed_at(point: str, step: int) -> Fault:
    def fault(where: str, at: int) -> None:
        if (where, at) == (point, step):
            raise KilledError

    return fault


def no_fault(where: str, at: int) -> None:
    """Nothing happens."""


def event(number: int, **changes: Any) -> FeedbackEvent:
    shown = [str((number * 7 + i) % 20) for i in range(3)]
    values = {"id": f"e{number}", "user": "ann", "shown": shown, "chosen": shown[number % 3]}
    return event_of({**values, **changes})


def make_pairs(model: Path) -> FeedbackPairs:
    known = {"ann": ["Film 3", "Film 4"], "new": []}
    return FeedbackPairs(load_tokenizer(str(model)), title=FILMS.get, liked=known.get, prompt=prompt_of)


class Trainer:
    """A policy with an adapter, its reference, and the points at which it may be stopped."""

    def __init__(self, model: Path, fault: Fault) -> None:
        self.model, self.fault, self.step = model, fault, 0
        self.learner = dpo_learner(model, lora=True)
        self.reference = loaded(model)

    def ref_logps(self, pairs: Sequence[Any]) -> Done:
        self.fault("reference", self.step)
        return Done(pair_logps(self.reference, pairs, limit=LIMIT))

    def update(self, pairs: Sequence[Any], ref_logps: Any, *, step: int) -> Done:
        metrics = self.learner.update(pairs, ref_logps, step=step)
        self.fault("updated", step)
        self.step = step + 1
        return Done(metrics)

    def save(self, folder: Path) -> Done:
        folder.mkdir(parents=True)
        (folder / "half").write_text("of it")
        self.fault("saving", self.step)
        save_trained(self.learner.model, self.learner, folder, str(self.model))
        self.fault("saved", self.step)
        return Done(None)

    def load(self, folder: Path) -> Done:
        load_trained(self.learner.model, self.learner, folder)
        return Done(None)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.learner.model.named_parameters()}


class FaultyFeed:
    """A consumer that may be stopped before it takes."""

    def __init__(self, consumer: FeedbackConsumer, trainer: Trainer) -> None:
        self.consumer, self.trainer = consumer, trainer

    def take(self, start: int, *, after: str | None) -> Any:
        self.trainer.fault("take", self.trainer.step)
        return self.consumer.take(start, after=after)


def learn(
    model: Path, log: Path, out: Path, *, fault: Fault = no_fault, num_steps: int | None = None
) -> tuple[Trainer, FeedbackState]:
    """Start or go on, and take what full batches of two events the log has; `num_steps`: wait for so many."""
    trainer, state = Trainer(model, fault), FeedbackState()
    run = Run(RunDirectory(out), num_steps=num_steps or 100, checkpoint_every=1, keep_checkpoints=2)
    consumer = FeedbackConsumer(log, batch_size=2, poll_seconds=0.001)
    if num_steps is None:
        consumer.stop()
    try:
        found, _ = run.store.latest_valid()
        if found is not None:
            state = FeedbackState(**run.restore(found, {"policy": trainer}))
            trainer.step = state.step
        else:
            run.directory.truncate_after(-1)  # what a step wrote that was not committed
        pairs = make_pairs(model)
        learn_from_feedback(FaultyFeed(consumer, trainer), pairs.pairs, policy=trainer, run=run, state=state)
    finally:
        consumer.close()
        run.close()
    return trainer, state


def fill(log: Path, numbers: Sequence[int]) -> None:
    writer = FeedbackLog(log)
    writer.append([event(i) for i in numbers])
    writer.close()


def main() -> None:
    model, log, out, point, step = sys.argv[1:]

    def fault(where: str, at: int) -> None:
        if (where, at) == (point, int(step)):
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    learn(Path(model), Path(log), Path(out), fault=fault)


if __name__ == "__main__":
    main()

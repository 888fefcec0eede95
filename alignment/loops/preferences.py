"""A policy learns from answers that people compared, or found good or bad: the loop of DPO, KTO and their kin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, Protocol, TypeVar

from alignment.config import DpoRunConfig, KtoRunConfig
from alignment.interfaces import Metrics, Pending, Saves
from alignment.judgements import LabelledAnswer
from alignment.loops.offline import SftState, end_step, validation_is_due
from alignment.loops.preference_stages import Judged, Numbers, Stage
from alignment.loops.run import Run
from alignment.types import PreferencePair

R = TypeVar("R", bound=PreferencePair | LabelledAnswer)
AskReference = Callable[[Sequence[Any]], Numbers]
"""From records to what the reference says of them: now, or from a cache."""


class PreferenceTrainer(Saves, Protocol):
    """A policy that learns from records of one kind, and its reference."""

    def update(self, records: Sequence[Any], *reference: Numbers, step: int) -> Pending[Metrics]: ...
    def logps(self, records: Sequence[Any]) -> Pending[list[Any]]: ...
    def follow(self, *, step: int) -> Pending[Any]:
        """Let the reference go to where the policy is."""
        ...


class Records(Protocol[R]):
    """What to learn from."""

    def batch(self, step: int, batch_size: int) -> list[R]:
        """The records of a step, a pure function of it."""
        ...


def train_preferences(
    config: DpoRunConfig | KtoRunConfig,
    records: Records[R],
    held_out: Sequence[R],
    *,
    stage: Stage[R],
    policy: PreferenceTrainer,
    reference: AskReference | None,
    held_out_reference: Sequence[Numbers],
    run: Run,
    state: SftState,
    patience: float,
) -> None:
    """Batches of judgements, until the steps are done or validations have stopped getting better.

    Args:
        reference: None where the loss has no use for one.
        held_out_reference: what the reference said of the held-out parts before the first step. Validations go by it
            whatever the reference has followed since, so that they can be compared.
    """
    training, num_steps, sync_every = config.training, config.run.num_steps, config.reference.sync_every
    while state.step < num_steps and state.worse_in_a_row < patience:
        log = run.begin_step(state.step)
        batch = records.batch(state.step, training.batch_size)
        with log.phase("reference"):
            numbers = of_parts(stage.parts(batch), reference) if reference else []
        with log.phase("update"):
            log.metrics.update(policy.update(batch, *numbers, step=state.step).result())
        state.step += 1
        if sync_every and state.step % sync_every == 0:
            policy.follow(step=state.step).result()
        if validation_is_due(training.validate_every, state.step, num_steps):
            with log.phase("validate"):
                judged = Judged(logps=logps_of(policy, stage, held_out), reference=held_out_reference)
                log.metrics.update(stage.metrics(held_out, judged))
            state.judge(log.metrics["validation/loss"])
        end_step(run, log, state, {"policy": policy}, num_steps=num_steps, patience=patience)


def logps_of(policy: PreferenceTrainer, stage: Stage[R], records: Sequence[R]) -> list[Numbers]:
    """The policy's log-probabilities of every part."""
    return of_parts(stage.parts(records), lambda asked: policy.logps(asked).result())


def of_parts(parts: Sequence[Sequence[R]], ask: AskReference) -> list[Numbers]:
    """The numbers of each part, all asked for at once: records of one prompt may then share its computation."""
    numbers = iter(ask([record for part in parts for record in part]))
    return [list(islice(numbers, len(part))) for part in parts]

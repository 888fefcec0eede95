"""The live loop: choices arrive while it runs, and a policy learns from them in small steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from alignment.feedback_log import FeedbackEvent, Logged
from alignment.interfaces import Metrics, Pending, Saves
from alignment.loops.run import Run
from alignment.types import PreferencePair

RefLogps = Sequence[Sequence[float]]


class PairTrainer(Saves, Protocol):
    """A policy that learns from pairs, and the frozen reference that it is tied to."""

    def update(self, pairs: Sequence[PreferencePair], ref_logps: RefLogps, /, *, step: int) -> Pending[Metrics]: ...
    def ref_logps(self, pairs: Sequence[PreferencePair], /) -> Pending[RefLogps]: ...


class Feed(Protocol):
    """Events in the order of a log."""

    def take(self, start: int, *, after: str | None) -> Sequence[Logged]:
        """One step's events from place `start` on, always the same; waits for them. Empty: there will be none.

        `after`: the event before them, as the state remembers it; another log is refused."""
        ...


@dataclass(kw_only=True)
class FeedbackState:
    """Where a run stands. It lies in the checkpoint beside the weights: an event counts when both are on the disk,
    and what a kill undid is taken again."""

    step: int = 0
    """Completed steps."""
    next_event: int = 0
    """Place in the log of the first event that was not learnt from."""
    last_id: str | None = None
    """The event before it: a cursor into another log is noticed."""
    num_pairs: int = 0
    """Pairs that were learnt from."""
    num_skipped: int = 0
    """Events of steps whose gradient was not finite: taken, with nothing learnt from them."""


def learn_from_feedback(
    feed: Feed,
    pairs_of: Callable[[FeedbackEvent], list[PreferencePair]],
    *,
    policy: PairTrainer,
    run: Run,
    state: FeedbackState,
) -> None:
    """A step for each batch of events, until there are no more or `run.num_steps` are done.

    Args:
        pairs_of: a pure function, so that a step taken again learns the same.

    Raises:
        ValueError: a log without the events that were taken from it.
    """
    while state.step < run.num_steps and (taken := feed.take(state.next_event, after=state.last_id)):
        log = run.begin_step(state.step)
        pairs = [pair for logged in taken for pair in pairs_of(logged.event)]
        with log.phase("reference"):
            ref_logps = policy.ref_logps(pairs).result()
        with log.phase("update"):
            told = policy.update(pairs, ref_logps, step=state.step).result()
        state.step += 1
        state.next_event, state.last_id = taken[-1].sequence + 1, taken[-1].event.id
        if told["dpo/skipped_count"]:
            state.num_skipped += len(taken)
        else:
            state.num_pairs += len(pairs)
        log.metrics.update(told)
        log.metrics.update(
            {
                "feedback/events": state.next_event,
                "feedback/pairs": state.num_pairs,
                "feedback/skipped_count": state.num_skipped,
            }
        )
        run.finish_step(log)
        run.checkpoint(state.step, {"policy": policy}, asdict(state))

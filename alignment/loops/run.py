"""One run on disk and on the screen: metrics, rollouts, checkpoints, progress. It knows no maths."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment.checkpoint import CheckpointStore, load_json, save_json
from alignment.interfaces import Saves
from alignment.loops.invariants import Invariant, table
from alignment.metrics import MetricsWriter, ProgressLine
from alignment.run_directory import RunDirectory
from alignment.types import Rollout, Score


class StepLog:
    """The metrics of one step while it runs."""

    def __init__(self, step: int, num_steps: int, progress: ProgressLine) -> None:
        self.step, self.num_steps, self._progress = step, num_steps, progress
        self.metrics: dict[str, float] = {}
        self._began = time.monotonic()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase as `timing/name` and show it. An error that leaves it is told where it came up."""
        self._progress.phase(self.step, self.num_steps, name)
        began = time.monotonic()
        try:
            yield
        except Exception as error:
            error.add_note(f"in step {self.step}, {name}")
            raise
        self.metrics[f"timing/{name}"] = time.monotonic() - began

    def close(self) -> dict[str, float]:
        self.metrics["timing/step"] = time.monotonic() - self._began
        return self.metrics


class Run:
    """What a loop reports to."""

    def __init__(
        self,
        directory: RunDirectory,
        *,
        num_steps: int,
        checkpoint_every: int,
        keep_checkpoints: int,
        trackers: Sequence[str] = (),
        eos_is_trained: bool = True,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        self.directory, self.num_steps, self.checkpoint_every = directory, num_steps, checkpoint_every
        self.eos_is_trained, self.provenance = eos_is_trained, dict(provenance or {})
        self.store = CheckpointStore(directory.checkpoints, keep=keep_checkpoints)
        self.writer = MetricsWriter(directory, trackers)
        self.progress = ProgressLine()
        self._save_seconds = 0.0

    def begin_step(self, step: int) -> StepLog:
        return StepLog(step, self.num_steps, self.progress)

    def require(self, invariants: Sequence[Invariant]) -> None:
        """Print the table; a line that does not hold ends the run."""
        self.progress.message(table(invariants))
        failed = [item.name for item in invariants if not item.holds]
        if failed:
            raise RuntimeError(
                f"invariants: got {failed} broken, expected all to hold before the first update; see above"
            )

    def finish_step(self, log: StepLog, rollouts: Sequence[Rollout] = (), scores: Sequence[Score] = ()) -> None:
        """Write the step's metrics and samples, then its line on the screen."""
        metrics = log.close()
        metrics["timing/last_save"] = self._save_seconds
        self.writer.log(log.step, metrics)
        if rollouts:
            self.directory.append_rollouts(log.step, [_sample(r, s) for r, s in zip(rollouts, scores, strict=True)])
        self.progress.step(log.step, self.num_steps, metrics)

    def checkpoint(
        self,
        step: int,
        parts: Mapping[str, Saves],
        state: Mapping[str, Any],
        *,
        due: bool = False,
        pinned: int | None = None,
    ) -> None:
        """Commit the state after `step` completed steps, when it is due or the run ends.

        `pinned`: an earlier step whose checkpoint stays, however many follow.
        """
        if step % self.checkpoint_every and step != self.num_steps and not due:
            return
        began = time.monotonic()
        folder = self.store.begin(step)
        saving = [part.save(folder / name) for name, part in parts.items()]
        for pending in saving:
            pending.result()
        save_json(folder / "loop.json", dict(state))
        self.store.commit(step, self.provenance, pinned=pinned)
        self._save_seconds = time.monotonic() - began

    def restore(self, folder: Path, parts: Mapping[str, Saves]) -> dict[str, Any]:
        """Load the parts of a verified checkpoint and drop what was logged after it; returns the loop's state."""
        loading = [part.load(folder / name) for name, part in parts.items()]
        for pending in loading:
            pending.result()
        state: dict[str, Any] = load_json(folder / "loop.json")
        self.directory.truncate_after(state["step"] - 1)
        return state

    def close(self) -> None:
        self.writer.close()


def _sample(rollout: Rollout, score: Score) -> dict[str, Any]:
    return {
        "prompt_id": rollout.prompt.id,
        "sample_index": rollout.sample_index,
        "prompt": rollout.prompt.messages[-1]["content"],
        "response": rollout.response,
        "finish_reason": rollout.finish_reason,
        "weight_version": rollout.weight_version,
        "num_tokens": len(rollout.response_ids),
        "score": score.total,
        "parts": dict(score.parts),
        **({"failures": dict(score.failures)} if score.failures else {}),
    }

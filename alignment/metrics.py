"""Metrics: merged across workers, written to disk and trackers, shown while the run goes on.

Keys are `stage/name`. How a key merges is in its name: `_max`, `_min`, `_sum`, `count`; everything else is a mean.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from alignment.run_directory import RunDirectory, append_lines, write_text_atomic

REMEDY = {"tensorboard": "tensorboard", "wandb": "'raylign[track]'", "mlflow": "'raylign[track]'"}


def merge_metrics(parts: Sequence[Mapping[str, float]], weights: Sequence[float]) -> dict[str, float]:
    """Metrics of several workers or micro-batches as one.

    Args:
        parts: one mapping each; a key may be absent from some.
        weights: one per part, e.g. its token count. Means are weighted over the parts that have the key; a mean of
            zero weight is NaN.
    """
    if len(parts) != len(weights) or any(weight < 0 for weight in weights):
        raise ValueError(f"got {len(parts)} parts and weights {list(weights)}, expected one weight >= 0 per part")
    merged: dict[str, float] = {}
    for key in dict.fromkeys(key for part in parts for key in part):
        values = [(part[key], weight) for part, weight in zip(parts, weights, strict=True) if key in part]
        numbers = [value for value, _ in values]
        if key.endswith(("_sum", "count")):
            merged[key] = math.fsum(numbers)
        elif key.endswith(("_max", "_min")):
            extreme = max(numbers) if key.endswith("_max") else min(numbers)
            # max() and min() depend on the order when a NaN is among the numbers.
            merged[key] = math.nan if any(math.isnan(value) for value in numbers) else extreme
        else:
            total = math.fsum(weight for _, weight in values)
            weighted = math.fsum(value * weight for value, weight in values if weight)
            merged[key] = weighted / total if total else math.nan
    return merged


class Tracker(Protocol):
    """Where metrics go beside metrics.jsonl."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class MetricsWriter:
    """metrics.jsonl and the trackers named."""

    def __init__(self, run_directory: RunDirectory, trackers: Sequence[str] = ("tensorboard",)) -> None:
        """Nothing is written before the first `log`.

        Raises:
            ValueError: a tracker is unknown or not installed.
        """
        check_trackers(trackers)
        self._directory, self._names = run_directory, tuple(trackers)
        self._trackers: list[Tracker] | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, `null` where a number is not finite, and a point in every tracker."""
        numbers = {key: float(value) for key, value in metrics.items()}
        plain = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
        append_lines(self._directory.metrics, [json.dumps({"step": step, **plain}, allow_nan=False)])
        if self._trackers is None:
            # Opened here, because only now the first step is known: what a tracker has after it is of a lost attempt.
            self._trackers = [TRACKERS[name](self._directory, step) for name in self._names]
        for tracker in self._trackers:
            tracker.log(step, numbers)

    def close(self) -> None:
        for tracker in self._trackers or ():
            tracker.close()
        self._trackers = None


class _TensorBoard:
    def __init__(self, directory: RunDirectory, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(directory.tensorboard), purge_step=first_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, directory: RunDirectory, first_step: int) -> None:
        import wandb

        identity = _saved_identity(directory.path / ".wandb_id", uuid.uuid4().hex)
        self._run = wandb.init(
            project="raylign", name=directory.path.name, dir=str(directory.path), id=identity, resume="allow"
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    """MLFLOW_TRACKING_URI decides where; without it, a database in the run directory."""

    def __init__(self, directory: RunDirectory, first_step: int) -> None:
        from mlflow import MlflowClient

        if "MLFLOW_TRACKING_URI" in os.environ:
            self._client = MlflowClient()
        else:
            self._client = MlflowClient(tracking_uri=f"sqlite:///{directory.path.resolve() / 'mlflow.db'}")
        identity = directory.path / ".mlflow_id"
        if not identity.exists():
            found = self._client.get_experiment_by_name("raylign")
            experiment = found.experiment_id if found else self._client.create_experiment("raylign")
            run = self._client.create_run(experiment, run_name=directory.path.name)
            write_text_atomic(identity, run.info.run_id)
        self._run_id = identity.read_text()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self._client.log_metric(self._run_id, key, value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


TRACKERS: dict[str, Any] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "mlflow": _Mlflow}


def check_trackers(names: Sequence[str]) -> None:
    """
    Raises:
        ValueError: a tracker is unknown or not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"run.trackers: got {name!r}, expected some of {list(TRACKERS)}; correct the name")
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"run.trackers: got {name}, expected it installed; pip install {REMEDY[name]}")


def _saved_identity(path: Path, fresh: str) -> str:
    """The identity of an earlier start of this run, so that a resumed run goes on in the same place."""
    if not path.exists():
        write_text_atomic(path, fresh)
    return path.read_text()


class ProgressLine:
    """Live progress: one line rewritten in place on a terminal, few whole lines in a log. Numbers only, no text."""

    COLUMNS = {
        "reward": "reward/mean",
        "KL": "kl/per_sequence",
        "loss": "reward_model/loss",
        "SFT loss": "sft/loss",
        "held-out loss": "validation/loss",
    }

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        columns: Mapping[str, str] | None = None,
        min_interval: float = 5.0,
        clock: Any = time.monotonic,
    ) -> None:
        """`columns`: label -> metric key; absent metrics are left out. `min_interval`: seconds between log lines."""
        self._stream = sys.stdout if stream is None else stream
        self._tty = self._stream.isatty()
        self._columns = dict(self.COLUMNS if columns is None else columns)
        self._min_interval, self._clock = min_interval, clock
        self._began: float | None = None
        self._step_began = 0.0
        self._last_line = -math.inf
        self._phase: tuple[str, float] | None = None
        self._phase_seconds: dict[str, float] = {}
        self._num_done = 0
        self._live_width = 0

    def phase(self, step: int, total: int, name: str) -> None:
        """A phase of step `step` (counted from 0) of `total` begins. A log hears of it when it is new or slow."""
        now = self._clock()
        self._end_phase(now)
        self._phase = (name, now)
        if self._began is None:
            self._began = self._step_began = now
        text = f"step {step + 1}/{total}  {name} ..."
        if self._tty:
            self._rewrite(text)
        elif self._phase_seconds.get(name, math.inf) >= self._min_interval:
            self._line(text, now)

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Step `step` (counted from 0) of `total` is done."""
        now = self._clock()
        self._end_phase(now)
        if self._began is None:
            self._began = self._step_began = now
        self._num_done += 1
        seconds, self._step_began = now - self._step_began, now
        left = (now - self._began) / self._num_done * (total - step - 1)
        shown = [f"{label} {metrics[key]:.4g}" for label, key in self._columns.items() if key in metrics]
        text = "  ".join([f"step {step + 1}/{total}", *shown, f"{seconds:.1f} s", f"ETA {_duration(left)}"])
        first_or_last = self._num_done == 1 or step + 1 == total
        if first_or_last or now - self._last_line >= self._min_interval:
            self._line(text, now)
        elif self._tty:
            self._rewrite(text)

    def message(self, text: str) -> None:
        """Whole lines of the caller's, between the progress lines."""
        self._clear()
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def _end_phase(self, now: float) -> None:
        if self._phase is not None:
            name, began = self._phase
            self._phase_seconds[name] = now - began
            self._phase = None

    def _line(self, text: str, now: float) -> None:
        self.message(text)
        self._last_line = now

    def _rewrite(self, text: str) -> None:
        # One column less than the terminal has: a full row would wrap and could not be rewritten.
        text = text[: max(1, shutil.get_terminal_size().columns - 1)]
        self._stream.write(f"\r{text.ljust(self._live_width)}")
        self._stream.flush()
        self._live_width = len(text)

    def _clear(self) -> None:
        if self._live_width:
            self._stream.write(f"\r{' ' * self._live_width}\r")
            self._live_width = 0


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

"""Metrics: merged, written, shown."""

import importlib.util
import io
import json
import math
import os
import random
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from alignment.metrics import MetricsWriter, ProgressLine, merge_metrics
from alignment.run_directory import RunDirectory


@pytest.fixture(autouse=True)
def _same_umask_afterwards():
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_merge_by_the_name_of_the_key():
    parts = [
        {
            "ppo/kl": 1.0,
            "ppo/ratio_max": 2.0,
            "rollout/length_min": 5.0,
            "tokens_count": 10.0,
            "count": 1.0,
            "x_sum": 0.5,
        },
        {
            "ppo/kl": 4.0,
            "ppo/ratio_max": 1.0,
            "rollout/length_min": 3.0,
            "tokens_count": 20.0,
            "count": 2.0,
            "x_sum": 1.0,
        },
    ]
    assert merge_metrics(parts, [10, 20]) == {
        "ppo/kl": 3.0,
        "ppo/ratio_max": 2.0,
        "rollout/length_min": 3.0,
        "tokens_count": 30.0,
        "count": 3.0,
        "x_sum": 1.5,
    }


def test_merging_does_not_depend_on_how_tokens_are_split():
    generator = random.Random(0)
    values = [generator.gauss(0, 1) for _ in range(60)]
    whole = {"mean": sum(values) / 60, "value_max": max(values), "value_min": min(values), "count": 60.0}
    for _ in range(10):
        cuts = sorted(generator.sample(range(1, 60), 3))
        shards = [values[a:b] for a, b in zip([0, *cuts], [*cuts, 60], strict=True)]
        parts = [
            {"mean": sum(s) / len(s), "value_max": max(s), "value_min": min(s), "count": float(len(s))} for s in shards
        ]
        assert merge_metrics(parts, [len(s) for s in shards]) == pytest.approx(whole, rel=1e-12)


def test_merge_edges():
    assert merge_metrics([], []) == {}
    assert merge_metrics([{"a": 1.0}, {"b": 2.0}, {"a": 3.0}], [1, 5, 1]) == {"a": 2.0, "b": 2.0}
    assert merge_metrics([{"a": 1.0}, {"a": math.nan}], [1, 0]) == {"a": 1.0}  # a worker without tokens has no mean
    assert math.isnan(merge_metrics([{"a": 1.0}], [0])["a"])
    assert math.isnan(merge_metrics([{"a": 1.0}, {"a": math.nan}], [1, 1])["a"])
    for order in ([1.0, math.nan], [math.nan, 1.0]):
        assert math.isnan(merge_metrics([{"a_max": value} for value in order], [1, 1])["a_max"])
        assert math.isnan(merge_metrics([{"a_min": value} for value in order], [1, 1])["a_min"])
    with pytest.raises(ValueError, match="expected one weight >= 0 per part"):
        merge_metrics([{"a": 1.0}], [1, 2])
    with pytest.raises(ValueError, match="expected one weight >= 0 per part"):
        merge_metrics([{"a": 1.0}], [-1])


def lines(run: RunDirectory) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in run.metrics.read_text().splitlines()]


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_writer_writes_lines_and_tensorboard(tmp_path):
    run = RunDirectory(tmp_path)
    writer = MetricsWriter(run, ["tensorboard"])
    assert not run.metrics.exists()
    writer.log(0, {"reward/mean": 0.5, "ppo/kl": math.nan})
    assert lines(run) == [{"step": 0, "reward/mean": 0.5, "ppo/kl": None}]  # on disk before the step after begins
    assert points(run.tensorboard)["reward/mean"] == [(0, 0.5)]
    writer.log(1, {"reward/mean": 0.75, "ppo/kl": -math.inf})
    writer.close()
    writer.close()
    assert lines(run)[1] == {"step": 1, "reward/mean": 0.75, "ppo/kl": None}
    assert points(run.tensorboard)["reward/mean"] == [(0, 0.5), (1, 0.75)]
    assert run.metrics.stat().st_mode & 0o777 == 0o600


def test_resumed_writer_leaves_one_line_of_history(tmp_path):
    run = RunDirectory(tmp_path)
    first = MetricsWriter(run, ["tensorboard"])
    for step in range(4):
        first.log(step, {"reward/mean": float(step)})
    first.close()
    second = MetricsWriter(run, ["tensorboard"])  # opened before the cut, as a run does
    run.truncate_after(1)
    for step in (2, 3):
        second.log(step, {"reward/mean": 10.0 + step})
    second.close()
    expected = [(0, 0.0), (1, 1.0), (2, 12.0), (3, 13.0)]
    assert [(row["step"], row["reward/mean"]) for row in lines(run)] == expected
    assert points(run.tensorboard)["reward/mean"] == expected


def test_no_tracker_writes_lines_only(tmp_path):
    run = RunDirectory(tmp_path)
    writer = MetricsWriter(run, [])
    writer.log(3, {"a": 1})
    writer.close()
    assert lines(run) == [{"step": 3, "a": 1.0}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_missing_is_refused_with_the_remedy(tmp_path, monkeypatch, name):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == name else real(wanted))
    with pytest.raises(ValueError, match=rf"got {name}, expected it installed; pip install 'raylign\[track\]'"):
        MetricsWriter(RunDirectory(tmp_path), ["tensorboard", name])
    with pytest.raises(ValueError, match="got 'comet', expected some of"):
        MetricsWriter(RunDirectory(tmp_path), ["comet"])


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="needs pip install 'raylign[track]'")
def test_mlflow_goes_on_in_the_same_run(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = RunDirectory(tmp_path / "run")
    for step in (0, 1):
        writer = MetricsWriter(run, ["mlflow"])
        writer.log(step, {"reward/mean": step + 0.5})
        writer.close()
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run.path / 'mlflow.db'}")
    history = client.get_metric_history((run.path / ".mlflow_id").read_text(), "reward/mean")
    assert [(point.step, point.value) for point in history] == [(0, 0.5), (1, 1.5)]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs pip install 'raylign[track]'")
def test_wandb_offline_writes_into_the_run_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = RunDirectory(tmp_path / "run")
    writer = MetricsWriter(run, ["wandb"])
    writer.log(0, {"reward/mean": 0.5})
    writer.close()
    assert list((run.path / "wandb").glob("offline-run-*/run-*.wandb"))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drive(stream: io.StringIO, num_steps: int, seconds: dict[str, float], **options) -> list[str]:
    clock = Clock()
    progress = ProgressLine(stream, clock=clock, **options)
    for step in range(num_steps):
        for name, duration in seconds.items():
            progress.phase(step, num_steps, name)
            clock.now += duration
        progress.step(step, num_steps, {"reward/mean": step / 8, "kl/per_sequence": 2.0, "ppo/secret": 9.0})
    return stream.getvalue().splitlines()


def test_log_of_a_slow_run_announces_each_slow_phase_once():
    out = drive(io.StringIO(), 3, {"generate": 20.0, "score": 1.0, "update": 9.0})
    assert out == [
        "step 1/3  generate ...",
        "step 1/3  score ...",
        "step 1/3  update ...",
        "step 1/3  reward 0  KL 2  30.0 s  ETA 1:00",
        "step 2/3  generate ...",
        "step 2/3  update ...",
        "step 2/3  reward 0.125  KL 2  30.0 s  ETA 0:30",
        "step 3/3  generate ...",
        "step 3/3  update ...",
        "step 3/3  reward 0.25  KL 2  30.0 s  ETA 0:00",
    ]


def test_log_of_a_fast_run_stays_short():
    out = drive(io.StringIO(), 1000, {"update": 0.1})
    assert out[:2] == ["step 1/1000  update ...", "step 1/1000  reward 0  KL 2  0.1 s  ETA 1:40"]
    assert out[-1] == "step 1000/1000  reward 124.9  KL 2  0.1 s  ETA 0:00"
    assert 15 <= len(out) <= 25  # 100 seconds, a line every five
    assert "\r" not in "".join(out)


def test_terminal_rewrites_one_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "24")
    stream = Terminal()
    drive(stream, 2, {"generate": 10.0, "a name that is far too long": 1.0})
    text = stream.getvalue()
    # What a terminal shows: each carriage return goes back to the start of the row and writes over it.
    rows = []
    for row in text.split("\n")[:-1]:
        shown = ""
        for piece in row.split("\r"):
            shown = piece + shown[len(piece) :]
        rows.append(shown.rstrip())
    assert rows == ["step 1/2  reward 0  KL 2  11.0 s  ETA 0:11", "step 2/2  reward 0.125  KL 2  11.0 s  ETA 0:00"]
    live = [piece for row in text.split("\n") for piece in row.split("\r")[1:] if "..." in piece or "name" in piece]
    assert len(live) == 4
    assert max(map(len, live)) < 24


def test_eta_counts_from_where_this_process_began():
    clock = Clock()
    stream = io.StringIO()
    progress = ProgressLine(stream, clock=clock)
    for step in (7, 8):
        progress.phase(step, 10, "update")
        clock.now += 30.0
        progress.step(step, 10, {"kl/per_sequence": math.nan})
    shown = [line for line in stream.getvalue().splitlines() if "ETA" in line]
    assert shown == ["step 8/10  KL nan  30.0 s  ETA 1:00", "step 9/10  KL nan  30.0 s  ETA 0:30"]


def test_long_runs_show_hours_and_columns_are_the_callers():
    clock = Clock()
    stream = io.StringIO()
    progress = ProgressLine(stream, clock=clock, columns={"loss": "sft/loss", "none": "absent"})
    progress.phase(0, 100, "update")
    clock.now += 90.0
    progress.step(0, 100, {"sft/loss": 1.23456789})
    progress.message("held-out table")
    assert stream.getvalue().splitlines()[1:] == ["step 1/100  loss 1.235  90.0 s  ETA 2:28:30", "held-out table"]

"""The run directory: refusals, the lock, private files, atomic writes, cutting back on resume."""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from alignment.run_directory import RunDirectory, append_lines, write_text_atomic


@pytest.fixture(autouse=True)
def _same_umask_afterwards():
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_paths_are_the_documented_ones(tmp_path):
    run = RunDirectory(tmp_path / "deep" / "run")
    assert run.path.is_dir()
    names = [
        p.name
        for p in (run.config, run.metrics, run.rollouts, run.tensorboard, run.checkpoints, run.final, run.summary)
    ]
    assert names == [
        *("config.yaml", "metrics.jsonl", "rollouts.jsonl"),
        *("tensorboard", "checkpoints", "final", "summary.json"),
    ]
    assert list(run.path.iterdir()) == []


def test_everything_written_is_private(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.lock()
    run.append_rollouts(0, [{"response": "x"}])
    run.write_text_atomic(run.config, "a: 1\n")
    (run.path / "by_a_library.txt").write_text("x")
    run.checkpoints.mkdir()
    assert {path.name: mode(path) for path in run.path.iterdir()} == {
        ".lock": 0o600,
        "rollouts.jsonl": 0o600,
        "config.yaml": 0o600,
        "by_a_library.txt": 0o600,
        "checkpoints": 0o700,
    }
    assert mode(run.path) == 0o700


def test_refuses_a_file_and_what_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="got a file, expected a directory"):
        RunDirectory(tmp_path / "file")
    with pytest.raises(ValueError, match="expected a writable directory"):
        RunDirectory(tmp_path / "file" / "below")
    with pytest.raises(ValueError, match="expected a writable directory"):
        RunDirectory("/proc/run")  # refused even to root
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match=r"got .*expected"):
        RunDirectory(tmp_path / "loop")


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard", "final", "rollouts.jsonl", "config.yaml", ".lock"])
def test_refuses_links_that_lead_outside(tmp_path, name):
    (tmp_path / "outside").mkdir()
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="expected no link out of the run directory"):
        RunDirectory(run)


def test_a_link_to_the_directory_itself_is_fine(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    run = RunDirectory(tmp_path / "run")
    run.lock()
    assert (tmp_path / "disk" / ".lock").exists()


HOLD = """
import sys, time
from alignment.run_directory import RunDirectory
run = RunDirectory(sys.argv[1]); run.lock(); print("held", flush=True); time.sleep(60)
"""


def test_second_run_is_told_who_holds_the_directory(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        run = RunDirectory(tmp_path)
        with pytest.raises(
            ValueError, match=f"in use by pid {holder.pid} on {os.uname().nodename}, expected a free one"
        ):
            run.lock()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    run.lock()  # a killed holder does not keep it
    assert (tmp_path / ".lock").read_text() == f"pid {os.getpid()} on {os.uname().nodename}\n"
    with pytest.raises(ValueError, match=f"in use by pid {os.getpid()} "):
        RunDirectory(tmp_path).lock()
    run.unlock()
    run.unlock()
    RunDirectory(tmp_path).lock()


def test_require_space_says_need_and_free(tmp_path):
    run = RunDirectory(tmp_path)
    run.require_space(1)
    with pytest.raises(ValueError, match=r"got \d+\.\d\d GB free, expected at least 1000000\.00 GB"):
        run.require_space(10**15)


def test_atomic_write_replaces_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_text_atomic(path, "old")
    write_text_atomic(path, "new\ud800")
    assert path.read_text() == "new\\ud800"

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_text_atomic(path, "newer")
    assert path.read_text() == "new\\ud800"
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_rollouts_are_lines_with_their_step(tmp_path):
    run = RunDirectory(tmp_path)
    run.append_rollouts(0, [{"response": "two\nlines", "score": 1.5}, {"response": "é"}])
    run.append_rollouts(1, [{"response": "\ud800"}])  # a model can emit half a surrogate pair
    rows = [json.loads(line) for line in run.rollouts.read_text(encoding="utf-8").splitlines()]
    assert rows[0] == {"step": 0, "response": "two\nlines", "score": 1.5}
    assert rows[1] == {"step": 0, "response": "é"}
    assert rows[2]["step"] == 1


def test_truncate_after_cuts_later_and_torn_lines(tmp_path):
    run = RunDirectory(tmp_path)
    assert run.truncate_after(3) == 0
    for step in range(5):
        append_lines(run.metrics, [json.dumps({"step": step, "reward/mean": step / 10})])
        run.append_rollouts(step, [{"response": "é"}, {"response": "b"}])
    with run.metrics.open("a") as file:
        file.write('{"step": 5, "rew')
    before = run.metrics.read_text().splitlines()[:3]
    assert run.truncate_after(2) == 3 + 4
    assert run.metrics.read_text().splitlines() == before
    assert steps(run.rollouts) == [0, 0, 1, 1, 2, 2]
    assert mode(run.rollouts) == 0o600
    assert run.truncate_after(2) == 0
    assert run.truncate_after(-1) == 9
    assert run.metrics.read_text() == ""


def test_truncate_that_fails_leaves_the_file(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path)
    for step in range(3):
        append_lines(run.metrics, [json.dumps({"step": step})])

    def no_rename(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", no_rename)
    with pytest.raises(OSError, match="Read-only"):
        run.truncate_after(0)
    assert steps(run.metrics) == [0, 1, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


@pytest.mark.parametrize("line", ["{broken", '{"no_step": 1}', "3"])
def test_a_damaged_line_is_named(tmp_path, line):
    run = RunDirectory(tmp_path / "run")
    append_lines(run.metrics, ['{"step": 0}', line])
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: got a line that is no JSON object"):
        run.truncate_after(0)
    assert run.metrics.read_text() == '{"step": 0}\n' + line + "\n"


def test_seconds_are_those_of_completed_steps(tmp_path):
    run = RunDirectory(tmp_path / "run")
    assert run.seconds_of_steps(before=5) == 0
    append_lines(run.metrics, [f'{{"step": {step}, "timing/step": {2.0**step}}}' for step in range(4)])
    assert run.seconds_of_steps(before=3) == 7

"""One run on disk: who holds it, where its files are, and writes that a kill cannot leave half done.

Everything in it is private to the user: samples may be medical.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

BATCHES = "batches.txt"
"""What a run that ranks its answers has answered so far."""
PAIRS = "pairs.txt"
"""Of a run in rounds, the pairs of each."""
INNER = (
    *("config.yaml", "inputs.json", "metrics.jsonl", "rollouts.jsonl", BATCHES, PAIRS, "summary.json", ".lock"),
    *("report.json", "report.md", "hacking.md", "hacking.svg", "tensorboard", "checkpoints", "final"),
)


class RunDirectory:
    """`runs/NAME`: config.yaml metrics.jsonl rollouts.jsonl tensorboard/ checkpoints/ final/ summary.json."""

    def __init__(self, path: Path | str) -> None:
        """Create the directory, or check the one that is there. From here on the process writes files of mode 0600.

        Raises:
            ValueError: the path is a file, cannot be written, or one of its parts is a link that leads outside.
        """
        self.path = Path(path)
        os.umask(0o077)
        _refuse_shape(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise _not_writable(self.path, error.strerror) from None
        self._lock: int | None = None

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts.jsonl"

    @property
    def batches(self) -> Path:
        return self.path / BATCHES

    @property
    def pairs(self) -> Path:
        return self.path / PAIRS

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        return self.path / "final"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    def lock(self) -> None:
        """Hold the directory until `unlock` or the end of the process, however it ends.

        Raises:
            ValueError: another run holds it.
        """
        descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            refusal = _in_use(self.path, descriptor)
            os.close(descriptor)
            raise refusal from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._lock = descriptor

    def unlock(self) -> None:
        """Let go; without a lock it does nothing."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def require_space(self, num_bytes: int) -> None:
        """Refuse to start what the disk cannot hold.

        Raises:
            ValueError: fewer than `num_bytes` bytes are free.
        """
        free = shutil.disk_usage(self.path).free
        if free < num_bytes:
            raise ValueError(
                f"{self.path}: got {free / 1e9:.2f} GB free, expected at least {num_bytes / 1e9:.2f} GB for "
                "checkpoints; free some, lower run.keep_checkpoints, or choose another output-dir"
            )

    def write_text_atomic(self, path: Path, text: str) -> None:
        """The whole text or, after a kill, what was there before."""
        write_text_atomic(path, text)

    def keep_inputs(self, inputs: Mapping[str, str]) -> None:
        """Remember the fingerprints of what the run reads, by name; a later start must see the same.

        Raises:
            ValueError: one of them is another now.
        """
        path = self.path / "inputs.json"
        if not path.exists():
            write_text_atomic(path, json.dumps(dict(inputs), indent=1) + "\n")
            return
        kept = json.loads(path.read_text())
        changed = sorted(name for name in {*kept, *inputs} if kept.get(name) != inputs.get(name))
        if changed:
            raise ValueError(
                f"--resume: got another {' and '.join(changed)} than the run in {self.path} began with, expected the "
                "same contents; put them back, or choose another --output-dir"
            )

    def forget_start(self) -> None:
        """Remove what a start that trained nothing has written: it may have been refused for its config."""
        before = [path.name for path in self.path.glob("*_before.json")]
        for name in ("config.yaml", "inputs.json", *before, BATCHES, PAIRS):
            (self.path / name).unlink(missing_ok=True)

    def append_rollouts(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """One line per sample in rollouts.jsonl, the step first."""
        append_lines(self.rollouts, (json.dumps({"step": step, **row}, ensure_ascii=False) for row in rows))

    def seconds_of_steps(self, *, before: int) -> float:
        """What the completed steps below `before` took, in all starts of the run."""
        if not self.metrics.exists():
            return 0.0
        with open(self.metrics, encoding="utf-8", errors="backslashreplace") as lines:
            rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return math.fsum(row["timing/step"] for row in rows if row["step"] < before)

    def truncate_after(self, step: int) -> int:
        """Cut metric and rollout lines later than `step`, and a line that a kill cut short. Returns how many."""
        return sum(_keep_until(path, step) for path in (self.metrics, self.rollouts) if path.exists())


def trained(path: Path) -> bool:
    """Whether a run in `path` completed a step, or a batch of answers."""
    logs = (path / "metrics.jsonl", path / BATCHES)
    return any((path / "checkpoints").glob("step_*")) or any(log.is_file() and log.stat().st_size > 0 for log in logs)


def check_run_directory(path: Path) -> None:
    """Whether a run could start there, as far as can be told without creating or changing anything.

    Raises:
        ValueError: as `RunDirectory` and `RunDirectory.lock`.
    """
    _refuse_shape(path)
    nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not nearest.is_dir():
        raise _not_writable(path, f"the file {nearest} in its path")
    try:
        # Without a name where the system can: to root every folder looks writable, those of /proc too.
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise _not_writable(path, f"{nearest}, which takes no new file ({error.strerror})") from None
    try:
        descriptor = os.open(path / ".lock", os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _not_writable(path, f"{error.strerror}: .lock") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(path, descriptor) from None
    finally:
        os.close(descriptor)


def _refuse_shape(path: Path) -> None:
    try:
        there = path.exists()
    except OSError as error:
        raise _not_writable(path, error.strerror) from None
    if there and not path.is_dir():
        raise ValueError(f"{path}: got a file, expected a directory; choose another output-dir")
    if not there:
        if path.is_symlink():
            raise _not_writable(path, "a link that leads nowhere")
        return
    root = path.resolve()
    for name in INNER:
        inner = path / name
        if inner.is_symlink() and not inner.resolve().is_relative_to(root):
            raise ValueError(
                f"{inner}: got a link to {inner.resolve()}, expected no link out of the run directory; "
                "remove it, and put the whole output-dir on that disk"
            )


def _not_writable(path: Path, reason: str | None) -> ValueError:
    return ValueError(f"{path}: got {reason}, expected a writable directory; choose another output-dir")


def _in_use(path: Path, lock: int) -> ValueError:
    holder = os.pread(lock, 1000, 0).decode(errors="replace").strip() or "another process"
    return ValueError(
        f"{path}: got a run directory in use by {holder}, expected a free one; "
        "wait for that run, stop it, or choose another output-dir"
    )


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Append to a private file. It is opened anew each time, so that a cut in between cannot be undone."""
    with open(path, "a", encoding="utf-8", errors="backslashreplace", opener=_private) as file:
        file.writelines(f"{line}\n" for line in lines)


def write_text_atomic(path: Path, text: str) -> None:
    """Temporary file, fsync, rename, fsync of the folder: the new text or the old one, never half of it."""
    with _replacing(path) as file:
        file.write(text)


def fsync_path(path: Path) -> None:
    """Push a file's bytes or a folder's names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[str]]:
    temporary = path.with_name(f".tmp_{path.name}_{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace", opener=_private) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(path.parent)


def _keep_until(path: Path, step: int) -> int:
    num_cut = 0
    with open(path, encoding="utf-8", errors="backslashreplace") as old, _replacing(path) as new:
        for number, line in enumerate(old, start=1):
            if line.endswith("\n") and _step_of(line, path, number) <= step:
                new.write(line)
            else:
                num_cut += 1
    return num_cut


def _step_of(line: str, path: Path, number: int) -> int:
    try:
        step: int = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path}:{number}: got a line that is no JSON object with a step, expected one per line as the run wrote "
            "them; remove the line, or restore the file"
        ) from None
    return step

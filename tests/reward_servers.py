"""Reward servers as processes, for tests and benchmarks: the command that a person types."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Served:
    process: subprocess.Popen[str]
    url: str
    printed: list[str] = field(default_factory=list)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ask it to stop and return its exit status."""
        self.process.send_signal(number)
        return self.process.wait(60)

    @property
    def log(self) -> str:
        """All that it printed until now."""
        return "".join(self.printed)


@contextmanager
def reward_server(model: Path, *arguments: str, **environment: str) -> Iterator[Served]:
    """A server on a free port that has loaded its model."""
    process = subprocess.Popen(
        [sys.executable, "-m", "rewards.serve", str(model), "--port", "0", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    printed: list[str] = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith("listening on "):
            break
    else:
        process.wait(60)
        raise RuntimeError(f"the server ended with {process.returncode}: {''.join(printed)}")
    served = Served(process, printed[-1].removeprefix("listening on ").strip(), printed)
    reader = threading.Thread(target=lambda: printed.extend(process.stdout or ()), daemon=True)
    reader.start()
    try:
        yield served
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(60)
        reader.join(60)
        process.stdout.close()

"""Machines with addresses of their own on this one: Linux network namespaces on a switch that nothing else is on."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

NETWORK = "10.213.77"
"""Of the switch: the machine's own network neither sees nor routes it."""


_NUMBERS = itertools.count()


def reason_to_skip() -> str | None:
    """What is missing here, or None. A namespace is made to find out."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "needs root: network namespaces"
    if shutil.which("ip") is None:
        return "needs ip (Debian's iproute2)"
    name = f"rl{os.getpid()}probe"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if done.returncode:
        return f"needs network namespaces: {done.stderr.strip()}"
    _ip("netns", "delete", name)
    return None


@dataclass(frozen=True)
class Machine:
    """One namespace with its own address, host files shared with the others: the shared storage."""

    namespace: str
    address: str
    folder: Path
    """Its own, for what Ray would put below /tmp/ray. Short: sockets live there."""

    def command(self, arguments: Sequence[str]) -> list[str]:
        return ["ip", "netns", "exec", self.namespace, *arguments]

    def run(
        self, arguments: Sequence[str], environment: Mapping[str, str], *, cwd: Path, timeout: float
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(arguments),
            env={**environment, "RAY_TMPDIR": str(self.folder)},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def processes(self) -> list[int]:
        done = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True)
        return [int(pid) for pid in done.stdout.split()]

    def ends(self, seconds: float) -> bool:
        """Whether all that runs on it has ended on its own by then."""
        deadline = time.monotonic() + seconds
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        return not self.processes()

    def stop(self) -> None:
        """Kill what runs on it, again until nothing does: a process may start another meanwhile."""
        deadline = time.monotonic() + 30
        while (running := self.processes()) and time.monotonic() < deadline:
            for pid in running:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        assert not running, f"{self.namespace}: {running} do not end"


@contextmanager
def machines(count: int) -> Iterator[list[Machine]]:
    """`count` machines that reach each other and nothing else. They, and what runs on them, are gone at the end."""
    prefix = f"rl{os.getpid()}x{next(_NUMBERS)}"
    switch = f"{prefix}s"
    with ExitStack() as stack:
        _ip("netns", "add", switch)
        stack.callback(_ip, "netns", "delete", switch)
        _ip("-n", switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", switch, "link", "set", "switch", "up")
        made = []
        for i in range(1, count + 1):
            folder = Path(tempfile.mkdtemp(prefix=f"{prefix}n{i}", dir="/tmp"))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            machine = Machine(f"{prefix}n{i}", f"{NETWORK}.{i}", folder)
            _ip("netns", "add", machine.namespace)
            stack.callback(_ip, "netns", "delete", machine.namespace)
            stack.callback(machine.stop)
            _ip("-n", switch, "link", "add", f"port{i}", "type", "veth", "peer", "eth0", "netns", machine.namespace)
            _ip("-n", switch, "link", "set", f"port{i}", "master", "switch", "up")
            _ip("-n", machine.namespace, "address", "add", f"{machine.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", machine.namespace, "link", "set", device, "up")
            made.append(machine)
        yield made


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)

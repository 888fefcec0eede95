"""Peak memory of whole process trees: a run and all its actors.

    with MemoryMeter() as meter:
        train()
    print(meter.peak_mb)

Linux only: the figures come from /proc.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
SHARED_MEMORY = Path("/dev/shm")
KB_PER_MB = 1024
# Walking the page tables of a process takes about 20 ms per GB and holds its memory map; one part in a hundred of the
# time may go there, so that measuring does not slow down what is measured.
WALK_SHARE = 0.01


@dataclass
class _Member:
    """One process of the measured trees, and how much of its memory others hold as well (all in kB)."""

    pid: int
    shared_anonymous: float = 0.0  # anonymous pages that belong to other processes' share (after a fork)
    file_share: float = 1.0  # proportional over resident size of its mapped files
    shmem: float = 0.0  # proportional share of shared memory
    high_water_reset: bool = False  # whether the kernel's high-water mark began anew at the previous sample
    walk_after: float = 0.0  # time.monotonic() from which its page tables may be walked again

    def proportional_kb(self) -> float:
        """Most memory since the previous sample, shared pages divided among their holders, shared memory left out."""
        sizes = _fields(PROC / str(self.pid) / "status")
        anonymous, files = sizes.get("RssAnon", 0), sizes.get("RssFile", 0)
        if time.monotonic() >= self.walk_after:
            self._walk(anonymous, files)
        # Buffers that come and go between two samples raise the kernel's mark.
        excursion = sizes.get("VmHWM", 0) - sizes.get("VmRSS", 0) if self.high_water_reset else 0
        self.high_water_reset = _reset_high_water(self.pid)
        return max(0.0, anonymous - self.shared_anonymous) + files * self.file_share + excursion

    def _walk(self, anonymous: int, files: int) -> None:
        start = time.monotonic()
        sizes = _fields(PROC / str(self.pid) / "smaps_rollup")
        if "Pss_Anon" in sizes:
            # Growth between the two reads only lowers the difference, hence the floor at zero.
            self.shared_anonymous = max(0.0, anonymous - sizes["Pss_Anon"])
            self.file_share = min(1.0, sizes["Pss_File"] / files) if files else 1.0
            self.shmem = sizes["Pss_Shmem"]
        now = time.monotonic()
        self.walk_after = now + (now - start) / WALK_SHARE


class MemoryMeter:
    """Samples the memory of process trees in a thread and keeps the peak.

    Measured are the processes of `roots` (default: this process), their descendants, and every process that inherits
    this process' environment from now on: a daemon that a cluster launcher detaches is found by that mark.
    A page that several processes map is divided among them (proportional set size), so it counts once. Resident
    memory is read at every sample, with its highest value since the sample before (the kernel's high-water marks are
    reset for that); the shares of files and forked pages are measured less often, because measuring them is slow.
    Shared memory counts once: what the members map, or what /dev/shm grew by, whichever is more.

    Attributes:
        peak_mb: largest sum seen, in MB of 2**20 bytes.
        peak_processes: number of processes at that moment.
        samples: how often memory was read.
    """

    def __init__(
        self,
        roots: Collection[int] | None = None,
        *,
        interval: float = 0.2,
        count_dev_shm: bool = True,
        belongs: Callable[[int], bool] | None = None,
    ) -> None:
        """Prepare; nothing is read before `with`.

        Args:
            roots: process ids whose trees are measured; default this process.
            interval: seconds between samples.
            count_dev_shm: whether growth of /dev/shm counts when it exceeds what the members map; switch it off where
                other programs use /dev/shm at the same time.
            belongs: says whether a process (by id) that is neither below a root nor marked is measured too.

        Raises:
            OSError: this system has no /proc/PID/smaps_rollup.
        """
        if not (PROC / "self" / "smaps_rollup").exists():
            raise OSError("got a system without /proc/self/smaps_rollup, expected Linux 4.14 or later; measure there")
        self.peak_mb = 0.0
        self.peak_processes = 0
        self.samples = 0
        self._roots = {os.getpid()} if roots is None else set(roots)
        self._interval = interval
        self._count_dev_shm = count_dev_shm
        self._belongs = belongs
        self._mark = f"RAYLIGN_METER_{uuid.uuid4().hex}"
        self._members: dict[int, _Member] = {}
        self._known: set[int] = set()
        self._dev_shm_before = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-meter", daemon=True)

    def __enter__(self) -> MemoryMeter:
        os.environ[self._mark] = "1"
        self._dev_shm_before = _dev_shm_kb() if self._count_dev_shm else 0.0
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        os.environ.pop(self._mark, None)

    def _run(self) -> None:
        self._sample()
        while not self._stop.wait(self._interval):
            self._sample()
        self._sample()

    def _sample(self) -> None:
        self._find_members()
        private = sum(member.proportional_kb() for member in self._members.values())
        shared = sum(member.shmem for member in self._members.values())
        if self._count_dev_shm:
            shared = max(shared, _dev_shm_kb() - self._dev_shm_before)
        self.samples += 1
        if (total := (private + shared) / KB_PER_MB) > self.peak_mb:
            self.peak_mb, self.peak_processes = total, len(self._members)

    def _find_members(self) -> None:
        """Bring the list of members up to date. A process is judged once, when it is first seen."""
        alive = {int(entry) for entry in os.listdir(PROC) if entry.isdigit()}
        self._known &= alive
        self._members = {pid: member for pid, member in self._members.items() if pid in alive}
        new = {pid: _parent(pid) for pid in alive - self._known}
        self._known |= alive
        joining = {pid for pid in new if pid in self._roots or self._is_marked(pid)}
        self._members.update((pid, _Member(pid)) for pid in joining)
        while children := {pid for pid in new if new[pid] in self._members and pid not in self._members}:
            self._members.update((pid, _Member(pid)) for pid in children)

    def _is_marked(self, pid: int) -> bool:
        try:
            environment = (PROC / str(pid) / "environ").read_bytes()
        except OSError:  # it has ended, or it is another user's
            return False
        return self._mark.encode() in environment or (self._belongs is not None and self._belongs(pid))


def _fields(path: Path) -> dict[str, int]:
    """The `Name: 123 kB` lines of a /proc file; empty when the process has ended or belongs to another user."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split() for line in lines if line.endswith(" kB"))
    return {words[0].rstrip(":"): int(words[1]) for words in pairs}


def _reset_high_water(pid: int) -> bool:
    """Start the high-water mark of a process' resident memory anew; whether that was allowed."""
    try:
        (PROC / str(pid) / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _parent(pid: int) -> int:
    """Parent of a process, 0 when it has ended."""
    try:
        stat = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return 0
    return int(stat.rsplit(")", 1)[1].split()[1])  # the name before it may hold spaces and parentheses


def _dev_shm_kb() -> float:
    """Bytes in /dev/shm, deleted files that are still open included, in kB; 0 where there is none."""
    if not SHARED_MEMORY.is_dir():
        return 0.0
    usage = os.statvfs(SHARED_MEMORY)
    return (usage.f_blocks - usage.f_bfree) * usage.f_frsize / 1024

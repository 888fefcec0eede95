"""How much memory a run takes, all its processes together."""

from __future__ import annotations

import os
import resource
import threading
from pathlib import Path


def process_tree(root: int) -> list[int]:
    """`root` and all its descendants."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:  # the process ended while we looked
                continue
            parents[int(entry.name)] = int(stat.rsplit(")", 1)[1].split()[1])
    tree = {root}
    while children := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= children
    return sorted(tree)


def proportional_memory_mb(pids: list[int]) -> float:
    """Sum of the proportional set sizes: pages that processes share count once in all."""
    total = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return total / 1024


class PeakMemory:
    """Watches this process and its descendants every second in a thread; `peak_mb` is the largest sum seen."""

    def __init__(self, interval: float = 1.0) -> None:
        self.peak_mb, self._interval = 0.0, interval
        self._stop = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="peak-memory").start()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self.peak_mb = max(self.peak_mb, proportional_memory_mb(process_tree(os.getpid())))

    def stop(self) -> float:
        self._stop.set()
        return self.peak_mb or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

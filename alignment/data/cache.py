"""The cache folder on this machine, and the two things that keep it whole: a lock and an atomic rename."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_dir() -> Path:
    """$RAYLIGN_CACHE, else $XDG_CACHE_HOME/raylign, else ~/.cache/raylign."""
    if own := os.environ.get("RAYLIGN_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "raylign"
    return Path.home() / ".cache" / "raylign"


@contextmanager
def filled_once(target: Path) -> Iterator[Path | None]:
    """Yield an empty folder to fill, or None when `target` is there; the filled folder then becomes `target`.

    Only one process at a time is inside. A failure inside leaves no trace of a half-filled target.

    Raises:
        ValueError: the cache cannot be written.
    """
    if target.exists():
        yield None
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = open(target.with_name(target.name + ".lock"), "w")  # noqa: SIM115 - held beyond this block
    except OSError as error:
        raise ValueError(
            f"got cache folder {target.parent} ({error.strerror}), expected one that can be written; "
            "set RAYLIGN_CACHE to a folder of yours"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            yield None
            return
        folder = Path(tempfile.mkdtemp(prefix=target.name + ".tmp.", dir=target.parent))
        try:
            yield folder
            os.replace(folder, target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

"""Whether a run that starts again sees what it began with: short names for the contents of models and data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

SAMPLE_BYTES = 64 * 2**10
NUM_SAMPLES = 64


def model_fingerprint(path: str, revision: str | None = None) -> str:
    """sha256 of a model folder: of small files all bytes, of large ones the size and evenly spread samples.

    Another training, another shard or a truncated file shows; one changed number in gigabytes may not. A hub name
    stands for itself and the commit that its revision is of in the cache, or else the revision.
    """
    folder = Path(path)
    if not folder.is_dir():
        return f"{path}@{_cached_commit(path, revision) or revision}"
    total = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file() and not file.name.startswith("."):
            size = file.stat().st_size
            total.update(f"{file.name} {size}\n".encode())
            for part in _parts(file, size):
                total.update(part)
    return total.hexdigest()


def records_fingerprint(records: Iterable[object]) -> str:
    """sha256 over the records in order; they are dataclasses of plain data, whose `repr` tells them apart."""
    total = hashlib.sha256()
    for record in records:
        total.update(repr(record).encode() + b"\n")
    return total.hexdigest()


def _cached_commit(name: str, revision: str | None) -> str | None:
    """Of a branch or tag as the cache last saw it: `main` of today may be another model tomorrow."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(config).parent.name if isinstance(config, str) else None


def _parts(file: Path, size: int) -> Iterable[bytes]:
    with open(file, "rb") as source:
        if size <= SAMPLE_BYTES * NUM_SAMPLES:
            yield source.read()
            return
        for index in range(NUM_SAMPLES):
            source.seek((size - SAMPLE_BYTES) * index // (NUM_SAMPLES - 1), os.SEEK_SET)
            yield source.read(SAMPLE_BYTES)

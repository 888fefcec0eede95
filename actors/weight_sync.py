"""Carry the policy's weights to the rollout engines, and prove that they arrived.

Weights travel in buckets of some megabytes: neither side ever holds a second whole model, and the policy packs bucket
k + 1 while the engine loads bucket k. `weight_routes` has the ways a bucket can take. The receiver hashes the bytes it
got; at the end both sides compute the log-probabilities of a fixed probe prompt. A sync that did not arrive is an
error: nobody samples from stale weights.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from actors.weight_routes import BroadcastGroup, Payload, Route, fetch, ship

SyncKind = Literal["changed", "whole", "adapter"]
"""What a sync must carry to an engine: merged weights that differ from the base, all weights, or the adapter alone."""

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
BUCKET_BYTES = 64 * 2**20
"""Large enough that the call per bucket costs nothing, small beside any model."""
BUCKETS_UNDER_WAY = 2
"""One is packed while the engine loads the other."""
ALIGNMENT = 64
"""Every tensor starts at such an offset: a view of another dtype must not start in between."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightBucket:
    """Some named weights of one policy version."""

    version: int
    index: int
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    offsets: tuple[int, ...]
    """Where each tensor starts in `payload`, in bytes."""
    payload: Payload
    """The bytes, or how to get at them."""
    digest: str
    """sha256 over version, index, names, shapes, dtypes, offsets and the fingerprint of the bytes."""


def plan_buckets(sizes: Sequence[int], *, limit: int = BUCKET_BYTES) -> list[range]:
    """Consecutive tensors of `sizes` bytes, cut into buckets of at most `limit`; a larger tensor travels alone."""
    buckets: list[range] = []
    start, filled = 0, 0
    for i, size in enumerate(sizes):
        if i > start and filled + size > limit:
            buckets.append(range(start, i))
            start, filled = i, 0
        filled += size
    return [*buckets, range(start, len(sizes))] if sizes else []


def pack_bucket(
    weights: Iterable[tuple[str, Tensor]], *, version: int, index: int, route: Route = "object_store"
) -> WeightBucket:
    """Copy (name, tensor) pairs into one block of host memory and hash it."""
    return pack_block(weights, version=version, index=index, device="cpu", route=route)[0]


def pack_block(
    weights: Iterable[tuple[str, Tensor]], *, version: int, index: int, device: torch.device | str, route: Route
) -> tuple[WeightBucket, Tensor]:
    """`pack_bucket` on a device of choice, and the block itself: (bytes,) uint8, to be kept until it has been read."""
    named = [(name, tensor.detach().contiguous()) for name, tensor in weights]
    offsets, end = [], 0
    for _, tensor in named:
        offsets.append(end)
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    block = torch.zeros(end, dtype=torch.uint8, device=device)
    for (_, tensor), offset in zip(named, offsets, strict=True):
        block[offset : offset + tensor.nbytes].copy_(tensor.reshape(-1).view(torch.uint8))
    bucket = WeightBucket(
        version=version,
        index=index,
        names=tuple(name for name, _ in named),
        shapes=tuple(tuple(tensor.shape) for _, tensor in named),
        dtypes=tuple(str(tensor.dtype).removeprefix("torch.") for _, tensor in named),
        offsets=tuple(offsets),
        payload=ship(block, route),
        digest="",
    )
    return replace(bucket, digest=digest(bucket, block)), block


def unpack_bucket(bucket: WeightBucket, group: BroadcastGroup | None = None) -> list[tuple[str, Tensor]]:
    """The (name, tensor) pairs again, as views of the block that came; `group` is what a broadcast comes through.

    Raises:
        RuntimeError: the bytes are not those that were sent.
    """
    # torch warns about the object store's read-only pages; the receiver only copies from these views.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        block = fetch(bucket.payload, group)
    got = digest(bucket, block)
    if got != bucket.digest:
        raise RuntimeError(
            f"weight sync of version {bucket.version}, bucket {bucket.index}: got bytes with sha256 {got[:12]}, "
            f"expected {bucket.digest[:12]}; the engine has no usable weights now, resume the run from its last step"
        )
    tensors = []
    for name, shape, dtype_name, offset in zip(
        bucket.names, bucket.shapes, bucket.dtypes, bucket.offsets, strict=True
    ):
        dtype = getattr(torch, dtype_name)
        end = offset + math.prod(shape) * dtype.itemsize
        tensors.append((name, block[offset:end].view(dtype).reshape(shape)))
    return tensors


def digest(bucket: WeightBucket, block: Tensor) -> str:
    """sha256 over everything but payload and digest, and over the fingerprint of the bytes."""
    described = (bucket.version, bucket.index, bucket.names, bucket.shapes, bucket.dtypes, bucket.offsets)
    return hashlib.sha256(f"{described!r} {fingerprint(block)}".encode()).hexdigest()


def fingerprint(block: Tensor) -> str:
    """What two blocks (bytes,) uint8 have in common only if they are equal: sha256 on the CPU, a checksum on a GPU.

    Bytes on a GPU never leave it for this: both ends of a route that ends there compute the checksum.
    """
    return hashlib.sha256(block.numpy().data).hexdigest() if block.device.type == "cpu" else checksum(block)


def checksum(block: Tensor) -> str:
    """Two sums over 32-bit words, one weighted by position (Fletcher 1982), modulo 2^64.

    It finds any single changed word and any two that were swapped; it is no defence against an attacker.
    """
    words = torch.nn.functional.pad(block, (0, -len(block) % 4)).view(torch.int32).long()
    places = torch.arange(1, len(words) + 1, device=block.device)
    return f"{int(words.sum()):x} {int((words * places).sum()):x} {len(block)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterUpdate:
    """The adapter of one policy version, as the two files that peft writes: megabytes instead of the model."""

    version: int
    files: Mapping[str, bytes]
    digest: str
    """sha256 over version, names and bytes."""


def pack_adapter(folder: Path, *, version: int) -> AdapterUpdate:
    """Read what `alignment.adapters.save_adapter` wrote."""
    files = {name: (folder / name).read_bytes() for name in ADAPTER_FILES}
    return AdapterUpdate(version=version, files=files, digest=adapter_digest(version, files))


def unpack_adapter(update: AdapterUpdate, folder: Path) -> None:
    """Write the files again.

    Raises:
        RuntimeError: the bytes are not those that were sent.
    """
    got = adapter_digest(update.version, update.files)
    if got != update.digest or set(update.files) != set(ADAPTER_FILES):
        raise RuntimeError(
            f"weight sync of version {update.version}, adapter: got files {sorted(update.files)} with sha256 "
            f"{got[:12]}, expected {update.digest[:12]}; resume the run from its last step"
        )
    for name in ADAPTER_FILES:
        (folder / name).write_bytes(update.files[name])


def adapter_digest(version: int, files: Mapping[str, bytes]) -> str:
    total = hashlib.sha256(str(version).encode())
    for name in sorted(files):
        total.update(f"{name}:{len(files[name])}:".encode())
        total.update(files[name])
    return total.hexdigest()


class SyncState:
    """What one engine has received of a version. Weights that arrived in part are weights of no version."""

    def __init__(self, version: int = 0) -> None:
        self._version: int | None = version
        self._incoming: int | None = None
        self._expected = 0
        self._received: list[int] = []

    @property
    def version(self) -> int:
        """The version whose weights are all here.

        Raises:
            RuntimeError: a sync began and did not end.
        """
        if self._version is None:
            raise RuntimeError(
                f"weight sync of version {self._incoming}: got buckets {self._received} of {self._expected} and no "
                "end, expected all of them before the next sampling; send the weights again, or resume the run"
            )
        return self._version

    def begin(self, version: int, buckets: int) -> None:
        self._version, self._incoming, self._expected, self._received = None, version, buckets, []

    def received(self, bucket: WeightBucket) -> None:
        if bucket.version != self._incoming or bucket.index != len(self._received):
            raise RuntimeError(
                f"weight sync: got bucket {bucket.index} of version {bucket.version}, expected bucket "
                f"{len(self._received)} of version {self._incoming}; begin the sync anew"
            )
        self._received.append(bucket.index)

    def complete(self, version: int) -> None:
        """Check that everything arrived; call before the engine makes the weights its own."""
        if version != self._incoming or len(self._received) != self._expected:
            raise RuntimeError(
                f"weight sync of version {version}: got {len(self._received)} of {self._expected} buckets of version "
                f"{self._incoming}, expected all; the engine has no usable weights now, resume the run from its last "
                "step"
            )

    def end(self, version: int) -> None:
        self._version, self._incoming = version, None

    def forget(self) -> None:
        """The weights are gone (a deep sleep): nothing may be sampled before the next sync."""
        self.begin(-1, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """A fixed prompt and what the trainer thinks of it."""

    version: int
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """log p(ids[t] | ids[:t]) for t >= 1, at temperature 1."""


def probe_ids(vocab_size: int, length: int = 24) -> tuple[int, ...]:
    """The same ids on both sides, spread over the vocabulary."""
    return tuple((7919 * (i + 1)) % vocab_size for i in range(length))


def check_gap(got: Sequence[float], expected: Sequence[float], *, limit: float, what: str) -> float:
    """Mean |got - expected| of two runs of log-probabilities.

    Raises:
        RuntimeError: it is above `limit`, or not a number.
    """
    if len(got) != len(expected) or not got:
        raise RuntimeError(f"{what}: got {len(got)} log-probabilities, expected {len(expected)} and at least one")
    gap = sum(abs(a - b) for a, b in zip(got, expected, strict=True)) / len(got)
    if not gap <= limit:  # NaN is too far
        raise RuntimeError(
            f"{what}: got a mean |engine - trainer| log-probability of {gap:.3g}, expected at most {limit:g}; look "
            "at: stale or swapped weights, another temperature, another chat template, another dtype"
        )
    return gap

"""Carry the policy's weights to the rollout engines, and prove that they arrived.

Weights travel as byte arrays through Ray's object store (shared memory on one node, no pickled callables); the
receiver hashes what it got. A sync that did not arrive is an error: nobody samples from stale weights.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightUpdate:
    """Named weights of one policy version."""

    version: int
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    buffers: tuple[np.ndarray, ...]
    """uint8 views, one per name: numpy arrays cross the object store without a copy, torch tensors would not."""
    digest: str
    """sha256 over names, shapes and bytes."""


def pack_weights(weights: Iterable[tuple[str, Tensor]], *, version: int) -> WeightUpdate:
    """Collect (name, tensor) pairs into a `WeightUpdate` on the CPU."""
    named = [(name, tensor.detach().cpu().contiguous()) for name, tensor in weights]
    names = tuple(name for name, _ in named)
    shapes = tuple(tuple(tensor.shape) for _, tensor in named)
    dtypes = tuple(str(tensor.dtype).removeprefix("torch.") for _, tensor in named)
    buffers = tuple(tensor.reshape(-1).view(torch.uint8).numpy() for _, tensor in named)
    return WeightUpdate(
        version=version,
        names=names,
        shapes=shapes,
        dtypes=dtypes,
        buffers=buffers,
        digest=digest(names, shapes, buffers),
    )


def unpack_weights(update: WeightUpdate) -> list[tuple[str, Tensor]]:
    """The (name, tensor) pairs again. Raises RuntimeError when the bytes are not those that were sent."""
    got = digest(update.names, update.shapes, update.buffers)
    if got != update.digest:
        raise RuntimeError(
            f"weight sync of version {update.version}: got bytes with sha256 {got[:12]}, expected "
            f"{update.digest[:12]}; the rollout engine keeps its old weights, resume the run from its last step"
        )
    tensors = []
    for name, shape, dtype, buffer in zip(update.names, update.shapes, update.dtypes, update.buffers, strict=True):
        # torch warns about the object store's read-only pages; the receiver only copies from this view.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            flat = torch.from_numpy(buffer)
        tensors.append((name, flat.view(getattr(torch, dtype)).reshape(shape)))
    return tensors


def digest(names: Iterable[str], shapes: Iterable[tuple[int, ...]], buffers: Iterable[np.ndarray]) -> str:
    total = hashlib.sha256()
    for name, shape, buffer in zip(names, shapes, buffers, strict=True):
        total.update(f"{name}{shape}".encode())
        total.update(buffer.data)
    return total.hexdigest()

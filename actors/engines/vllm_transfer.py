"""vLLM's side of a weight sync through shared memory; imported by every vLLM worker through `worker_extension_cls`.

One bucket lies in an anonymous memory file of the sender. Only its address and a description of what is inside go
through vLLM's control channel; nothing is pickled. The worker maps the file, hashes it, and hands views of it to the
model's own weight loaders.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from actors.weight_sync import WeightBucket, unpack_bucket

BACKEND = "raylign_shared_memory"
EXTENSION = "actors.engines.vllm_transfer.WorkerExtension"


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """A `WeightBucket` whose payload lies in the file `path`."""

    path: str
    nbytes: int
    version: int
    index: int
    names: list[str]
    shapes: list[list[int]]
    dtypes: list[str]
    offsets: list[int]
    digest: str


class SharedMemoryTransfer(WeightTransferEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]):
    """Loads buckets in checkpoint format, layer by layer.

    Up to 0.24 the worker itself opens and closes the layerwise reload and hands `load_weights` in; later releases call
    the two methods here. Either way a layer's weights are repacked for the device once the last of them has come.
    """

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        return

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():  # copies from the host finish before the mapping goes
            torch.accelerator.synchronize()

    def receive_weights(
        self, update_info: SharedMemoryUpdateInfo, load_weights: Callable[..., Any] | None = None
    ) -> None:
        bucket = WeightBucket(
            version=update_info.version,
            index=update_info.index,
            names=tuple(update_info.names),
            shapes=tuple(tuple(shape) for shape in update_info.shapes),
            dtypes=tuple(update_info.dtypes),
            offsets=tuple(update_info.offsets),
            payload=map_segment(update_info.path, update_info.nbytes),
            digest=update_info.digest,
        )
        model: Any = self.model
        (load_weights or model.load_weights)(unpack_bucket(bucket))

    def shutdown(self) -> None:
        return

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """0.24 asks every engine for one; the sender here is `VllmEngine.receive`."""
        raise NotImplementedError("buckets are sent by VllmEngine.receive")


class WorkerExtension:
    """Mixed into vLLM's worker; the import of this module registers the transfer engine there."""

    def abandon_weight_update(self) -> None:
        """Forget a sync that did not end, so that another can begin: what its buckets left in the layers as well."""
        worker: Any = self
        for layer in worker.model_runner.get_model().modules():
            info = get_layerwise_info(layer)
            if info.can_load():
                info.loaded_weights.clear()
                info.load_numel = 0
        worker._weight_update_active = False


@contextlib.contextmanager
def shared_segment(payload: np.ndarray) -> Iterator[str]:
    """A path under which processes of this user can map `payload` (uint8) for the time of the block.

    An anonymous file needs no room in /dev/shm, which containers keep small, and leaves nothing behind when a process
    is killed.
    """
    file = os.memfd_create("raylign-weights", os.MFD_CLOEXEC)
    try:
        rest: memoryview = payload.data
        while rest:
            rest = rest[os.write(file, rest) :]
        yield f"/proc/{os.getpid()}/fd/{file}"
    finally:
        os.close(file)


def map_segment(path: str, nbytes: int) -> np.ndarray:
    """(nbytes,) uint8 view; the memory lives as long as any array or tensor that looks into it."""
    with open(path, "rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), nbytes, access=mmap.ACCESS_READ), dtype=np.uint8)


WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryTransfer)

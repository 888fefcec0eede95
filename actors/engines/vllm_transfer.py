"""vLLM's side of a weight sync; imported by every vLLM worker through `worker_extension_cls`.

A description of each bucket goes through vLLM's control channel, and where its bytes are: in an anonymous memory file
of the engine's process, in GPU memory that the worker may map, next in a broadcast that the worker takes part in, or
in this very process.
Nothing that could be called is pickled. The worker hashes the bytes and hands views of them to the model's own weight
loaders.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
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

from actors.rendezvous import Rendezvous
from actors.weight_routes import Announced, BroadcastGroup, CudaShare, Payload
from actors.weight_sync import WeightBucket, unpack_bucket

BACKEND = "raylign_buckets"
EXTENSION = "actors.engines.vllm_transfer.WorkerExtension"


@dataclass
class BucketInitInfo(WeightTransferInitInfo):
    """The broadcast group to join, if there is one: a `Rendezvous` as a dict, and the rank of worker 0."""

    rendezvous: dict[str, Any] | None = None
    first_rank: int = 1


@dataclass
class BucketUpdateInfo(WeightTransferUpdateInfo):
    """A `WeightBucket`; its payload as a dict: a file to map, a `CudaShare`, an `Announced` or the block."""

    version: int
    index: int
    names: list[str]
    shapes: list[list[int]]
    dtypes: list[str]
    offsets: list[int]
    digest: str
    payload: dict[str, Any]


class BucketTransfer(WeightTransferEngine[BucketInitInfo, BucketUpdateInfo]):
    """Loads buckets in checkpoint format, layer by layer.

    Up to 0.24 the worker itself opens and closes the layerwise reload and hands `load_weights` in; later releases call
    the two methods here. Either way a layer's weights are repacked for the device once the last of them has come.
    """

    init_info_cls = BucketInitInfo
    update_info_cls = BucketUpdateInfo
    group: BroadcastGroup | None = None

    def init_transfer_engine(self, init_info: BucketInitInfo) -> None:
        """Called again whenever the group is formed anew."""
        self.group = None
        if init_info.rendezvous is not None:
            rank = init_info.first_rank + self.parallel_config.rank
            self.group = BroadcastGroup(Rendezvous(**init_info.rendezvous), rank=rank)

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():  # copies finish before the memory they read goes
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: BucketUpdateInfo, load_weights: Callable[..., Any] | None = None) -> None:
        bucket = WeightBucket(
            version=update_info.version,
            index=update_info.index,
            names=tuple(update_info.names),
            shapes=tuple(tuple(shape) for shape in update_info.shapes),
            dtypes=tuple(update_info.dtypes),
            offsets=tuple(update_info.offsets),
            payload=payload_of(update_info.payload),
            digest=update_info.digest,
        )
        model: Any = self.model
        (load_weights or model.load_weights)(unpack_bucket(bucket, self.group))

    def shutdown(self) -> None:
        self.group = None

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
def described(bucket: WeightBucket) -> Iterator[dict[str, Any]]:
    """`bucket` as a `BucketUpdateInfo` for the workers, valid within the block."""
    info = {
        "version": bucket.version,
        "index": bucket.index,
        "names": list(bucket.names),
        "shapes": [list(shape) for shape in bucket.shapes],
        "dtypes": list(bucket.dtypes),
        "offsets": list(bucket.offsets),
        "digest": bucket.digest,
    }
    payload = bucket.payload
    if isinstance(payload, np.ndarray):
        with memory_file(payload) as path:
            yield {**info, "payload": {"path": path, "nbytes": payload.nbytes}}
    else:
        yield {**info, "payload": {"block": payload} if isinstance(payload, torch.Tensor) else asdict(payload)}


def payload_of(fields: dict[str, Any]) -> Payload:
    """What `described` made a dict of."""
    if "block" in fields:
        block: torch.Tensor = fields["block"]
        return block
    if "path" in fields:
        return map_file(**fields)
    return CudaShare(**fields) if "handle" in fields else Announced(**fields)


@contextlib.contextmanager
def memory_file(payload: np.ndarray) -> Iterator[str]:
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


def map_file(path: str, nbytes: int) -> np.ndarray:
    """(nbytes,) uint8 view; the memory lives as long as any array or tensor that looks into it."""
    with open(path, "rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), nbytes, access=mmap.ACCESS_READ), dtype=np.uint8)


WeightTransferEngineFactory.register_engine(BACKEND, BucketTransfer)

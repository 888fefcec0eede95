"""How the bytes of a weight bucket get from the policy to an engine.

- `same_process`: as they are.
- `object_store`: as a numpy array with the call. Works everywhere; weights on a GPU pass through host memory.
- `cuda_ipc`: both processes are on one GPU: the engine maps the policy's memory.
- `broadcast`: one collective for all engines: NCCL between GPUs, gloo between CPUs.

Only plain numbers and bytes travel beside the weights; nothing is pickled that could be called.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from actors.rendezvous import Rendezvous, join_group

BROADCAST_TIMEOUT = timedelta(seconds=120)
"""How long a member waits for the others in a broadcast: a dead one must not hang the rest."""

Route = Literal["same_process", "object_store", "cuda_ipc", "broadcast"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CudaShare:
    """A block of this machine's GPU memory, for a process that is not the one that allocated it."""

    handle: bytes
    nbytes: int
    offset: int
    counter_handle: bytes
    counter_offset: int
    event_handle: bytes
    event_sync: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Announced:
    """Bytes that come through the broadcast group next."""

    nbytes: int


Payload = Tensor | np.ndarray | CudaShare | Announced


@dataclass(frozen=True, kw_only=True, slots=True)
class Whereabouts:
    """What decides between the routes: the node of a process and the GPU it computes on (None on a CPU)."""

    node: str
    gpu: str | None


def whereabouts(device: str) -> Whereabouts:
    """Of this process."""
    gpu = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid) if device != "cpu" else None
    return Whereabouts(node=_boot_id(), gpu=gpu)


def _boot_id() -> str:
    """One value per running kernel: containers of a machine share it, and its GPUs."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def choose_route(policy: Whereabouts, engines: list[Whereabouts]) -> Route:
    """The shortest way that every engine can take."""
    if policy.gpu is None or any(engine.gpu is None for engine in engines):
        return "object_store"
    if all(engine == policy for engine in engines):
        return "cuda_ipc"
    # NCCL refuses two ranks on one GPU.
    gpus = [(place.node, place.gpu) for place in (policy, *engines)]
    return "broadcast" if len(set(gpus)) == len(gpus) else "object_store"


def ship(block: Tensor, route: Route) -> Payload:
    """What travels for `block`, (bytes,) uint8; `fetch` is the other end."""
    if route == "same_process":
        return block
    if route == "cuda_ipc":
        return share_cuda(block)
    if route == "broadcast":
        return Announced(nbytes=len(block))
    array: np.ndarray = block.numpy()  # crosses the object store without a copy, a torch tensor would not
    return array


def share_cuda(block: Tensor) -> CudaShare:
    """`block` as another process of this GPU can map it. The block must live until that process has read it."""
    _, handle, nbytes, offset, counter, counter_offset, event, event_sync = block.untyped_storage()._share_cuda_()
    return CudaShare(
        handle=handle,
        nbytes=nbytes,
        offset=offset,
        counter_handle=counter,
        counter_offset=counter_offset,
        event_handle=event,
        event_sync=event_sync,
    )


def map_cuda(share: CudaShare) -> Tensor:
    """(bytes,) uint8 view of the sender's memory, valid for as long as the sender keeps it."""
    storage: Any = torch.UntypedStorage._new_shared_cuda(
        torch.cuda.current_device(),  # the same GPU may have another number here
        share.handle,
        share.nbytes,
        share.offset,
        share.counter_handle,
        share.counter_offset,
        share.event_handle,
        share.event_sync,
    )
    return torch.empty(0, dtype=torch.uint8, device="cuda").set_(storage)


class BroadcastGroup:
    """One sender (rank 0) and its receivers, beside whatever torch.distributed already runs in each process."""

    def __init__(self, rendezvous: Rendezvous, *, rank: int, store: dist.Store | None = None) -> None:
        """`store`: rank 0's own, from `open_rendezvous`. Returns once the group exists; NCCL connects on first use."""
        self.device, self.rank = rendezvous.device, rank
        self.group, self.store = join_group(rendezvous, rank=rank, store=store, timeout=BROADCAST_TIMEOUT)

    def send(self, block: Tensor) -> None:
        """Rank 0: give `block` (uint8, on the group's device) to everyone. NCCL returns when it is enqueued."""
        self._broadcast(block)

    def receive(self, announced: Announced) -> Tensor:
        """(bytes,) uint8 on the group's device."""
        block = torch.empty(announced.nbytes, dtype=torch.uint8, device=self.device)
        self._broadcast(block)
        return block

    def _broadcast(self, block: Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self.group.broadcast([block], options).wait()


def fetch(payload: Payload, group: BroadcastGroup | None = None) -> Tensor:
    """(bytes,) uint8 of a payload, whichever way it comes."""
    if isinstance(payload, Tensor):
        return payload
    if isinstance(payload, np.ndarray):
        return torch.from_numpy(payload)
    if isinstance(payload, CudaShare):
        return map_cuda(payload)
    if group is None:
        raise RuntimeError("weight sync: got a broadcast without a group, expected join() before it")
    return group.receive(payload)

"""Process groups of torch.distributed beside whatever else a process runs: formed at every start, on free ports."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch.distributed as dist

from alignment.distributed import GroupRanks

Backend = Literal["gloo", "nccl"]
MEETING_TIMEOUT = timedelta(seconds=120)
"""How long a member waits for the others to come."""
STEP_TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for one that still computes. The connection to one that died ends at once, with gloo."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendezvous:
    """Where the members of a process group meet."""

    address: str
    port: int
    world_size: int
    backend: Backend

    @property
    def device(self) -> str:
        """Where the group's collectives run."""
        return "cuda" if self.backend == "nccl" else "cpu"


def node_address() -> str:
    """Where the other processes of the cluster reach this one: loopback unless Ray runs on several machines."""
    import ray

    address: str = ray.util.get_node_ip_address() if ray.is_initialized() else "127.0.0.1"
    return address


def interface_of(address: str) -> str | None:
    """The network interface that has an IPv4 address; None when none has it."""
    get_address = 0x8915  # SIOCGIFADDR
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                answer = fcntl.ioctl(any_socket.fileno(), get_address, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


def open_rendezvous(address: str, *, world_size: int, backend: Backend) -> tuple[Rendezvous, dist.Store]:
    """Rank 0: listen on a free port of `address` alone (a bare TCPStore would listen on every interface)."""
    listener = socket.create_server((address, 0))
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        address,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=MEETING_TIMEOUT,
        master_listen_fd=listener.detach(),
    )
    return Rendezvous(address=address, port=port, world_size=world_size, backend=backend), store


def _store_of(meeting: Rendezvous) -> dist.Store:
    """Rank 0's, as the others reach it."""
    return dist.TCPStore(meeting.address, meeting.port, is_master=False, timeout=MEETING_TIMEOUT)


def join_group(
    meeting: Rendezvous, *, rank: int, store: dist.Store | None, timeout: timedelta
) -> tuple[Any, dist.Store]:
    """The process group and the store that it must outlive. `store`: rank 0's own, None elsewhere."""
    store = store or _store_of(meeting)
    if meeting.backend == "gloo":
        return _gloo(store, rank=rank, world_size=meeting.world_size, timeout=timeout), store
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, meeting.world_size, options), store


def _gloo(store: dist.Store, *, rank: int, world_size: int, timeout: timedelta) -> Any:
    """A gloo group that listens on this node's address in the cluster, or on the interfaces of GLOO_SOCKET_IFNAME.

    Gloo's own choice is what the host name resolves to: another network, or a loopback address that other machines
    take for themselves.
    """
    gloo: Any = dist.ProcessGroupGloo  # whose options the type stubs name otherwise
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return gloo(store, rank, world_size, timeout)
    options = gloo._Options()
    options._timeout = timeout
    options._devices = [gloo.create_device(hostname=node_address())]
    return gloo(store, rank, world_size, options)


def join_ranks(meeting: Rendezvous, *, rank: int, store: dist.Store | None) -> GroupRanks:
    """The ranks of a group, once all have come: torch's default process group of this process, which FSDP2 and
    DeepSpeed build on."""
    store = store or _store_of(meeting)
    if interface := interface_of(meeting.address if rank == 0 else node_address()):
        # Gloo's own choice is what the host name resolves to, which other machines may not reach.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    dist.init_process_group(
        meeting.backend, store=store, rank=rank, world_size=meeting.world_size, timeout=STEP_TIMEOUT
    )
    return GroupRanks(dist.group.WORLD, device=meeting.device)

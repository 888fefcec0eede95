"""Which address a process group listens on."""

from __future__ import annotations

import socket
import threading
from datetime import timedelta

import psutil
import pytest
import torch
from torch.distributed import ReduceOp

from actors import rendezvous

ADDRESS = "127.0.0.2"
"""Of this machine on Linux, and not what its name resolves to."""


def listening() -> set[tuple[str, int]]:
    found = psutil.Process().net_connections(kind="tcp")
    return {tuple(one.laddr) for one in found if one.status == psutil.CONN_LISTEN}


def test_a_group_listens_on_the_address_of_its_node_alone(monkeypatch):
    try:
        socket.create_server((ADDRESS, 0)).close()
    except OSError:
        pytest.skip(f"has no {ADDRESS}")
    monkeypatch.setattr(rendezvous, "node_address", lambda: ADDRESS)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    before = listening()
    meeting, store = rendezvous.open_rendezvous(ADDRESS, world_size=2, backend="gloo")
    sums: dict[int, torch.Tensor] = {}
    opened: set[tuple[str, int]] = set()

    def join(rank: int) -> None:
        group, kept = rendezvous.join_group(
            meeting, rank=rank, store=store if rank == 0 else None, timeout=timedelta(seconds=30)
        )
        total = torch.tensor([rank + 1.0])
        group.allreduce([total], ReduceOp.SUM).wait()
        opened.update(listening() - before)
        group.barrier().wait()
        sums[rank] = total
        del group, kept

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {rank: total.item() for rank, total in sums.items()} == {0: 3.0, 1: 3.0}
    assert len(opened) >= 2, "the store and gloo"
    assert {address for address, _ in opened} == {ADDRESS}

"""Every way that a bucket can take ends in the same weights, and a damaged block is refused on each."""

from __future__ import annotations

import threading

import pytest
import torch
from tiny import write_tiny_model

from actors.engines.transformers import TransformersEngine
from actors.rendezvous import open_rendezvous
from actors.weight_routes import BroadcastGroup, Whereabouts, choose_route
from actors.weight_sync import checksum, pack_block, pack_bucket, unpack_bucket
from alignment.models import load_causal_lm

CPU, FIRST, SECOND = Whereabouts(node="n", gpu=None), Whereabouts(node="n", gpu="a"), Whereabouts(node="n", gpu="b")
ELSEWHERE = Whereabouts(node="m", gpu="a")


@pytest.mark.parametrize(
    ("policy", "engines", "route"),
    [
        (CPU, [CPU], "object_store"),
        (FIRST, [CPU], "object_store"),
        (CPU, [FIRST], "object_store"),
        (FIRST, [FIRST], "cuda_ipc"),
        (FIRST, [SECOND], "broadcast"),
        (FIRST, [SECOND, ELSEWHERE], "broadcast"),
        (FIRST, [FIRST, SECOND], "object_store"),  # NCCL takes one rank per GPU
        (FIRST, [SECOND, SECOND], "object_store"),
    ],
)
def test_the_shortest_way_that_every_engine_can_take(policy, engines, route):
    assert choose_route(policy, engines) == route


def test_checksum_is_known_and_finds_a_changed_bit_a_swap_and_a_cut():
    block = torch.tensor([1, 0, 0, 0, 2, 0, 0, 0, 3], dtype=torch.uint8)
    assert checksum(block) == "6 e 9"  # 1 + 2 + 3 and 1 * 1 + 2 * 2 + 3 * 3
    torch.manual_seed(0)
    block = torch.randint(0, 256, (4096,), dtype=torch.uint8)
    seen = {checksum(block)}
    for bit in range(0, 8 * 4096, 997):
        changed = block.clone()
        changed[bit // 8] ^= 1 << (bit % 8)
        seen.add(checksum(changed))
    swapped = torch.cat([block[4:8], block[:4], block[8:]])
    seen |= {checksum(swapped), checksum(block[:-1]), checksum(torch.cat([block, torch.zeros(1, dtype=torch.uint8)]))}
    assert len(seen) == 1 + len(range(0, 8 * 4096, 997)) + 3


def started(work) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def meet(*joins) -> BroadcastGroup:
    """Rank 0, and whoever joins: gloo's members are made at the same time, each waits for the others."""
    rendezvous, store = open_rendezvous("127.0.0.1", world_size=len(joins) + 1, backend="gloo")
    threads = [
        started(lambda join=join, rank=rank: join(rendezvous, rank)) for rank, join in enumerate(joins, start=1)
    ]
    sender = BroadcastGroup(rendezvous, rank=0, store=store)
    for thread in threads:
        thread.join()
    return sender


def joined(receivers: int) -> tuple[BroadcastGroup, list[BroadcastGroup]]:
    groups: dict[int, BroadcastGroup] = {}

    def join(rendezvous, rank):
        groups[rank] = BroadcastGroup(rendezvous, rank=rank)

    sender = meet(*[join] * receivers)
    return sender, [groups[rank] for rank in sorted(groups)]


def test_a_broadcast_brings_every_bit_to_two_receivers():
    sender, receivers = joined(2)
    torch.manual_seed(0)
    weights = {"a": torch.randn(300, 5), "b": torch.randn(7).bfloat16()}
    bucket, block = pack_block(weights.items(), version=3, index=0, device="cpu", route="broadcast")
    arrived: dict[int, list] = {}
    threads = [
        started(lambda i=i, g=g: arrived.update({i: unpack_bucket(bucket, g)})) for i, g in enumerate(receivers)
    ]
    sender.send(block)
    for thread in threads:
        thread.join()
    assert len(arrived) == 2
    for name, tensor in [*arrived[0], *arrived[1]]:
        assert tensor.dtype == weights[name].dtype
        assert torch.equal(tensor, weights[name])


def test_a_bit_that_flips_on_the_way_is_refused():
    sender, (receiver,) = joined(1)
    bucket, block = pack_block([("a", torch.randn(64))], version=1, index=2, device="cpu", route="broadcast")
    block[17] ^= 1
    thread = started(lambda: sender.send(block))
    with pytest.raises(RuntimeError, match="version 1, bucket 2"):
        unpack_bucket(bucket, receiver)
    thread.join()


def test_a_broadcast_without_a_group_is_refused():
    bucket = pack_bucket([("a", torch.randn(4))], version=1, index=0, route="broadcast")
    with pytest.raises(RuntimeError, match="got a broadcast without a group"):
        unpack_bucket(bucket)


def test_the_embedded_engine_samples_from_weights_that_were_broadcast(tmp_path):
    path = str(write_tiny_model(tmp_path / "model"))
    models = [
        load_causal_lm(path, dtype=torch.float32, attention="sdpa", revision=None, device="cpu") for _ in range(2)
    ]
    with torch.no_grad():
        for parameter in models[0].model.parameters():
            parameter.mul_(1.5)
    engine = TransformersEngine(models[1], max_batch=4)
    sender = meet(lambda rendezvous, rank: engine.join(rendezvous, first_rank=rank))
    named = models[0].model.named_parameters()
    bucket, block = pack_block(named, version=1, index=0, device="cpu", route="broadcast")
    thread = started(lambda: sender.send(block))
    engine.begin_sync(version=1, buckets=1)
    engine.receive(bucket)
    thread.join()
    assert engine.finish_sync(version=1) == 1
    for ours, theirs in zip(models[0].model.parameters(), models[1].model.parameters(), strict=True):
        assert torch.equal(ours, theirs)

"""Weights arrive as they were sent, or not at all."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from actors.weight_sync import SyncState, check_gap, pack_bucket, plan_buckets, probe_ids, unpack_bucket


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_keeps_every_bit(dtype):
    torch.manual_seed(0)
    weights = {"a": torch.randn(3, 5).to(dtype), "b.c": torch.randn(7).to(dtype), "t": torch.randn(4, 2).to(dtype).T}
    bucket = pack_bucket(weights.items(), version=4, index=0)
    assert bucket.version == 4
    arrived = unpack_bucket(bucket)
    assert [name for name, _ in arrived] == list(weights)
    for name, tensor in arrived:
        assert tensor.dtype == dtype
        assert torch.equal(tensor, weights[name])


def test_one_flipped_bit_is_refused():
    bucket = pack_bucket([("a", torch.randn(64))], version=1, index=3)
    damaged = bucket.payload.copy()
    damaged[17] ^= 1
    with pytest.raises(RuntimeError, match="version 1, bucket 3"):
        unpack_bucket(dataclasses.replace(bucket, payload=damaged))


@pytest.mark.parametrize(
    "change",
    [{"shapes": ((2, 4),)}, {"names": ("b",)}, {"dtypes": ("int32",)}, {"version": 2}, {"index": 1}],
    ids=lambda change: next(iter(change)),
)
def test_another_description_of_the_same_bytes_is_refused(change):
    bucket = pack_bucket([("a", torch.randn(4, 2))], version=1, index=0)
    with pytest.raises(RuntimeError, match="weight sync"):
        unpack_bucket(dataclasses.replace(bucket, **change))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([], []),
        ([5], [[0]]),
        ([4, 6, 1], [[0, 1], [2]]),
        ([11, 1], [[0], [1]]),  # one that is too large travels alone
        ([1, 11, 1, 9, 1], [[0], [1], [2, 3], [4]]),
    ],
)
def test_buckets_hold_at_most_ten_bytes_or_one_tensor(sizes, expected):
    assert [list(bucket) for bucket in plan_buckets(sizes, limit=10)] == expected


def small(version: int, index: int):
    return pack_bucket([("a", torch.zeros(2))], version=version, index=index)


def test_a_sync_that_did_not_end_leaves_no_version():
    sync = SyncState()
    assert sync.version == 0
    sync.begin(1, 2)
    sync.received(small(1, 0))
    with pytest.raises(RuntimeError, match=r"version 1: got buckets \[0\] of 2 and no end"):
        _ = sync.version
    with pytest.raises(RuntimeError, match="got 1 of 2 buckets"):
        sync.complete(1)
    sync.received(small(1, 1))
    with pytest.raises(RuntimeError, match="of version 1, expected all"):
        sync.complete(2)
    sync.complete(1)
    sync.end(1)
    assert sync.version == 1


@pytest.mark.parametrize(("version", "index"), [(1, 1), (2, 0), (1, 5)])
def test_buckets_come_in_order_and_of_one_version(version, index):
    sync = SyncState()
    sync.begin(1, 3)
    with pytest.raises(RuntimeError, match="expected bucket 0 of version 1"):
        sync.received(small(version, index))


def test_forgotten_weights_have_no_version():
    sync = SyncState()
    sync.forget()
    with pytest.raises(RuntimeError, match="no end"):
        _ = sync.version


def test_gap_is_the_mean_distance_and_nan_is_too_far():
    assert check_gap([-1.0, -2.0], [-1.5, -2.0], limit=0.3, what="x") == pytest.approx(0.25)
    for got in ([-1.0, -3.0], [-1.0, float("nan")], [-1.0]):
        with pytest.raises(RuntimeError, match="x: got"):
            check_gap(got, [-1.5, -2.0], limit=0.3, what="x")


def test_probe_ids_lie_in_the_vocabulary():
    for size in (259, 49152):
        ids = probe_ids(size)
        assert len(set(ids)) == len(ids) == 24
        assert all(0 <= i < size for i in ids)

"""Weights that never leave the GPU on their way."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from actors.weight_routes import CudaShare, map_cuda, share_cuda
from actors.weight_sync import WeightBucket, checksum, pack_block, unpack_block

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def in_another_process(work, *args):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *args).result(timeout=120)


def test_checksum_is_the_same_on_both_devices():
    torch.manual_seed(0)
    block = torch.randint(0, 256, (100_003,), dtype=torch.uint8)
    assert checksum(block) == checksum(block.cuda())


def test_another_process_maps_the_memory_of_this_gpu():
    block = torch.arange(1000, device="cuda").to(torch.uint8)
    torch.cuda.synchronize()
    assert in_another_process(sum_of, share_cuda(block)) == int(block.long().sum())


def sum_of(share: CudaShare) -> int:
    return int(map_cuda(share).long().sum())


def test_a_bucket_is_verified_in_another_process():
    weight = torch.randn(300, 5, device="cuda")
    bucket, block = pack_block([("a", weight)], version=3, index=0, device="cuda", route="cuda_ipc")
    torch.cuda.synchronize()
    assert in_another_process(first_of, bucket) == pytest.approx(float(weight.double().sum()), abs=1e-9)
    block[17] ^= 1
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="version 3, bucket 0"):
        in_another_process(first_of, bucket)


def first_of(bucket: WeightBucket) -> float:
    ((_, tensor),) = unpack_block(bucket)
    return float(tensor.double().sum())

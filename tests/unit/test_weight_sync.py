"""Weights arrive as they were sent, or not at all."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from actors.weight_sync import pack_weights, unpack_weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_keeps_every_bit(dtype):
    torch.manual_seed(0)
    weights = {"a": torch.randn(3, 5).to(dtype), "b.c": torch.randn(7).to(dtype), "t": torch.randn(4, 2).to(dtype).T}
    update = pack_weights(weights.items(), version=4)
    assert update.version == 4
    for name, tensor in unpack_weights(update):
        assert tensor.dtype == dtype
        assert torch.equal(tensor, weights[name])


def test_one_flipped_bit_is_refused():
    update = pack_weights([("a", torch.randn(64))], version=1)
    damaged = update.buffers[0].copy()
    damaged[17] ^= 1
    with pytest.raises(RuntimeError, match="weight sync of version 1"):
        unpack_weights(dataclasses.replace(update, buffers=(damaged,)))


def test_another_shape_of_the_same_bytes_is_refused():
    update = pack_weights([("a", torch.randn(4, 2))], version=1)
    with pytest.raises(RuntimeError, match="weight sync"):
        unpack_weights(dataclasses.replace(update, shapes=((2, 4),)))

"""What an adapter begins with is the first rank's on every rank, whatever another machine made of it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from adapter_runs import attached, hidden, write_model
from torch import Tensor

from alignment import adapters
from alignment.distributed import Alone


class InTurn(Alone):
    """Two ranks that call one after the other: the second one's sum has what the first one brought."""

    size = 2

    def __init__(self, rank: int, brought: list[Tensor]) -> None:
        self.rank, self.brought = rank, brought

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        if self.rank == 0:
            self.brought += [tensor.detach().clone() for tensor in tensors]
            return
        for tensor, first in zip(tensors, self.brought, strict=True):
            tensor += first


@pytest.mark.parametrize("kind", ["lora", "dora", "pissa", "bottleneck", "p_tuning_v2", "prefix"])
def test_ranks_that_began_apart_compute_the_same(tmp_path, kind):
    folder = write_model(tmp_path / "model")
    (first, _), (second, _) = (attached(folder, kind, seed=seed) for seed in (1, 2))
    if kind == "pissa":  # the decomposition of another machine
        for _, layer in adapters.layers.tuner_layers(second.model):
            with torch.no_grad():
                layer.get_base_layer().weight += 0.01
    else:
        assert not all(map(torch.equal, first.model.state_dict().values(), second.model.state_dict().values()))
    brought: list[Tensor] = []
    before = hidden(first)
    adapters.share_start(first.model, InTurn(0, brought))
    adapters.share_start(second.model, InTurn(1, brought))
    assert torch.equal(hidden(first), before)
    assert torch.equal(hidden(second), before)
    with adapters.adapter_disabled(first.model), adapters.adapter_disabled(second.model):
        assert torch.equal(hidden(second), hidden(first))

"""Weights, gradients and moments split over the ranks by torch's FSDP2 (`fully_shard`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from alignment.distributed import Ranks
from alignment.engines.base import refuse_hook
from alignment.engines.torch import TorchEngine
from alignment.models import HfModel
from alignment.sharding import decoder_layers


def split_over_ranks(model: HfModel, *, keep_between_passes: bool = False) -> None:
    """Leave each rank with its part of every parameter; a layer is gathered while it computes and freed after.

    Args:
        keep_between_passes: let a layer stay whole from the forward to the backward: more memory, one gathering less.

    The ranks are those of torch's default process group.
    """
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    # Sums over ranks in float32; each is rounded to the parameter's dtype before a float32 master adds it up.
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in decoder_layers(model.model)[1]:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=not keep_between_passes)
    # What no layer holds, the tied embedding and head among it, belongs to the whole model.
    fully_shard(model, mesh=mesh, mp_policy=policy)
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        # Plain sums: the loss is divided by the count of all ranks already.
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)

    def enter(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = model(function, *args, **kwargs)
        if not torch.is_grad_enabled():  # no backward pass comes that would free them
            for part in parts:
                part.reshard()
        return result

    model.enter_by(enter)


class FsdpEngine(TorchEngine):
    """`TorchEngine` on parameters of which each rank holds a part: 16 or 18 bytes per weight, divided by the ranks."""

    in_lockstep = True

    def __init__(self, model: HfModel, *, ranks: Ranks, keep_between_passes: bool = False, **settings: Any) -> None:
        """`model` is split in place; the other arguments are those of `TorchEngine` and `split_over_ranks`."""
        split_over_ranks(model, keep_between_passes=keep_between_passes)
        super().__init__(model.named_parameters(), ranks=ranks, **settings)

    def _sum_over_ranks(self, stepped: list[nn.Parameter]) -> None:
        """Nothing is left to do: the backward pass has summed what each rank holds."""

    def _update(self, rate: float, before_forgetting: Callable[[], None] | None) -> float:
        refuse_hook(before_forgetting, "torch with zero_stage 2 or 3")
        return super()._update(rate, None)

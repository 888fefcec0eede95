"""Parameters that several ranks hold parts of: FSDP2's and ZeRO-3's. One at a time, whatever holds them.

`gathered`, `assign` and what is built on them are meetings: every rank of the model has to make the same calls in the
same order. Parameters that one process holds alone are themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The stack of equal layers of a transformer, and its name: the first list of modules."""
    return next((name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList))


def is_split(parameter: Tensor) -> bool:
    """Whether this process holds a part of it only."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def num_elements(parameter: Tensor) -> int:
    """Of the whole parameter, without gathering it."""
    return int(getattr(parameter, "ds_numel", 0)) or parameter.numel()


@torch.no_grad()
def gathered(tensor: Tensor) -> Tensor:
    """All of a parameter, or of a tensor that is split like one."""
    if isinstance(tensor, DTensor):
        full: Tensor = tensor.full_tensor()
        return full.detach()
    if hasattr(tensor, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.detach()


@torch.no_grad()
def assign(tensor: Tensor, value: Tensor) -> None:
    """Copy `value`, which every rank has, into this process' part of a parameter."""
    if isinstance(tensor, DTensor):
        from torch.distributed.tensor import distribute_tensor

        # src_data_rank: every rank takes its part from its own `value`.
        mesh, placements = tensor.device_mesh, tensor.placements
        part = distribute_tensor(value.to(tensor.dtype), mesh, placements, src_data_rank=None)
        tensor.to_local().copy_(part.to_local())
    elif hasattr(tensor, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([tensor], modifier_rank=0):
            tensor.copy_(value)
    else:
        tensor.copy_(value)


def collect(named: Iterable[tuple[str, Tensor]], *, keep: bool) -> dict[str, Tensor]:
    """Whole tensors by name. Split ones go to host memory one by one; `keep`: False for a rank that only takes part.

    A tensor with two names is gathered once and stays one.
    """
    known: dict[int, tuple[Tensor, Tensor]] = {}
    result: dict[str, Tensor] = {}
    for name, tensor in named:
        if id(tensor) not in known:
            full = gathered(tensor)
            # The key is an address: it must not be given to another tensor.
            known[id(tensor)] = tensor, full if not is_split(tensor) else full.cpu() if keep else torch.empty(0)
        if keep:
            result[name] = known[id(tensor)][1]
    return result


def gathered_state_dict(model: nn.Module, *, keep: bool = True) -> dict[str, Any]:
    """The model's state dict with whole tensors."""
    return collect(model.state_dict(keep_vars=True).items(), keep=keep)

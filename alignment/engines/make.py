"""The engine that a role's machines ask for."""

from __future__ import annotations

from typing import Any, Literal

from alignment.distributed import Alone, Ranks
from alignment.engines.base import Engine, Offload, ZeroStage
from alignment.engines.torch import TorchEngine
from alignment.models import HfModel

EngineKind = Literal["torch", "deepspeed"]


def make_engine(
    model: HfModel,
    *,
    ranks: Ranks | None = None,
    engine: EngineKind = "torch",
    zero_stage: ZeroStage = 0,
    offload: Offload = "none",
    device: str = "cpu",
    **settings: Any,
) -> Engine:
    """The optimiser of what of `model` needs a gradient, its adapter attached before.

    Args:
        ranks: None is one process without a process group, for which plain torch does what all the others do.
        zero_stage: what the ranks split (Rajbhandari 2020, arXiv 1910.02054): 1 moments and masters, 2 gradients too,
            3 weights too. With torch, 0 is data-parallel (DDP), 3 is FSDP2, and 2 is FSDP2 that keeps a layer whole
            between its forward and its backward.
        settings: those of `Schedule`.
    """
    if ranks is None or isinstance(ranks, Alone):
        return TorchEngine(model.named_parameters(), **settings)
    if engine == "deepspeed":
        from alignment.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(model, ranks=ranks, zero_stage=zero_stage, offload=offload, device=device, **settings)
    if zero_stage:
        from alignment.engines.fsdp import FsdpEngine

        return FsdpEngine(model, ranks=ranks, keep_between_passes=zero_stage == 2, **settings)
    return TorchEngine(model.named_parameters(), ranks=ranks, **settings)

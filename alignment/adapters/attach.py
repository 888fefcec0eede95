"""One way in for every method."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from alignment.adapters.adalora import RankBudget, attach_adalora
from alignment.adapters.bottleneck import attach_bottlenecks, blocks
from alignment.adapters.half import attach_half
from alignment.adapters.ia3 import attach_ia3, ia3_targets
from alignment.adapters.layers import START, is_adapter_name, target_names, tuner_layers
from alignment.adapters.low_rank import attach_lora
from alignment.adapters.method import TrainingMethod
from alignment.adapters.virtual_tokens import TokenSettings, attach_virtual_tokens
from alignment.config.model import VIRTUAL_TOKEN_TYPES, AdapterType
from alignment.distributed import Ranks
from alignment.sharding import decoder_layers


class Attachable(Protocol):
    """What of an `HfModel` is read and written."""

    model: Any
    layout: Any


def attach(
    model: Attachable,
    *,
    type: AdapterType,
    seed: int,
    total_updates: int,
    tokenizer: Any | None = None,
    r: int = 0,
    alpha: float = 32.0,
    target_modules: tuple[str, ...] | str = "all-linear",
    last_layers: int | None = None,
    budget: RankBudget = RankBudget(),
    virtual_tokens: TokenSettings = TokenSettings(),
    pissa_iterations: int | None = None,
    half_round: int | None = None,
) -> TrainingMethod | None:
    """Make `model` train by a method, in place; only what it trains (and a scalar head) stays trainable.

    Args:
        type: those of `adapter.type`; lora with r 0 leaves every parameter trainable.
        total_updates: optimiser steps of the whole run.
        tokenizer: of the text that virtual tokens start from.
        r: and all that follow are `AdapterConfig`'s; a method reads its own.

    Returns:
        What the learner has to tell of its updates; None for methods that need nothing of them.
    """
    where: dict[str, Any] = {"target_modules": target_modules, "last_layers": last_layers}
    inner = model.model
    if type == "half":
        return attach_half(inner, seed=seed, half_round=half_round or -(-total_updates // 2))
    if type == "adalora":
        updates: dict[str, Any] = {"total_updates": total_updates, "seed": seed}
        return attach_adalora(inner, r=r, alpha=alpha, budget=budget, **updates, **where)
    if type == "ia3":
        attach_ia3(inner, **where)
    elif type == "bottleneck":
        attach_bottlenecks(inner, r=r, last_layers=last_layers, seed=seed)
    elif type in VIRTUAL_TOKEN_TYPES:
        attach_virtual_tokens(inner, kind=type, settings=virtual_tokens, tokenizer=tokenizer, seed=seed)  # type: ignore[arg-type]
        # Every row has its own virtual tokens in front.
        model.layout = "padded"
    elif r:
        where["pissa_iterations"] = pissa_iterations
        attach_lora(inner, r=r, alpha=alpha, variant=type, seed=seed, **where)  # type: ignore[arg-type]
    return None


@torch.no_grad()
def share_start(model: Any, ranks: Ranks) -> None:
    """Give all ranks what an adapter begins with on the first: a decomposition, or a forward, of another machine
    differs in its last bits, and nothing later would bring the ranks together."""
    if ranks.size == 1:
        return
    shared = [p for name, p in model.named_parameters() if p.requires_grad or is_adapter_name(name)]
    # What pissa began with is missing from the weights below it.
    shared += [x.get_base_layer().weight for _, x in tuner_layers(model) if START in getattr(x, "lora_A", {})]
    if ranks.rank > 0:
        for parameter in shared:
            parameter.zero_()
    ranks.sum_(shared)


def check_targets(
    model: Any, *, type: AdapterType, r: int, target_modules: tuple[str, ...] | str, last_layers: int | None
) -> None:
    """Refuse what a method cannot be attached to; `model` may be without memory. Arguments are those of `attach`.

    Raises:
        ValueError: `adapter...: got ..., expected ...; remedy`.
    """
    layers = len(decoder_layers(model)[1])
    if last_layers is not None and last_layers > layers:
        raise ValueError(
            f"adapter.last_layers: got {last_layers}, expected at most the {layers} layers of this model; lower it, "
            "or set it to null for all"
        )
    # Each refuses on its way to what it is made for.
    if type == "ia3":
        ia3_targets(model, target_modules, last_layers)
    elif type == "bottleneck":
        blocks(model, last_layers)
    names = target_names(model, target_modules, last_layers)
    if type == "pissa":
        smallest = min((min(model.get_submodule(name).weight.shape), name) for name in names)
        if r > smallest[0]:
            raise ValueError(
                f"adapter.r: got {r} with adapter.type=pissa, expected at most {smallest[0]}, the singular values of "
                f"{smallest[1]}; lower it"
            )

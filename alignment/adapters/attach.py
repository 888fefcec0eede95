"""One way in for every method."""

from __future__ import annotations

from typing import Any, Protocol

from alignment.adapters.adalora import attach_adalora
from alignment.adapters.bottleneck import attach_bottlenecks
from alignment.adapters.half import attach_half
from alignment.adapters.ia3 import attach_ia3
from alignment.adapters.low_rank import attach_lora
from alignment.adapters.method import TrainingMethod
from alignment.adapters.virtual_tokens import attach_virtual_tokens
from alignment.config.model import VIRTUAL_TOKEN_TYPES, AdapterType


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
    target_r: int = 8,
    warmup_share: float = 0.1,
    final_share: float = 0.3,
    interval: int = 1,
    orthogonality: float = 0.5,
    num_tokens: int = 20,
    text: str | None = None,
    encoder: str = "mlp",
    encoder_hidden: int | None = None,
    half_round: int | None = None,
) -> TrainingMethod | None:
    """Make `model` train by a method, in place; only what it trains (and a scalar head) stays trainable.

    Args:
        type: those of `adapter.type`; lora with r 0 leaves every parameter trainable.
        total_updates: optimiser steps of the whole run.
        tokenizer: of `text`.
        r: and all that follow are `AdapterConfig`'s; a method reads its own.

    Returns:
        What the learner has to tell of its updates; None for methods that need nothing of them.
    """
    where: dict[str, Any] = {"target_modules": target_modules, "last_layers": last_layers}
    if type == "half":
        return attach_half(model.model, seed=seed, half_round=half_round or -(-total_updates // 2))
    if type == "adalora":
        return attach_adalora(
            model.model,
            init_r=r,
            target_r=target_r,
            alpha=alpha,
            total_updates=total_updates,
            warmup_share=warmup_share,
            final_share=final_share,
            interval=interval,
            orthogonality=orthogonality,
            seed=seed,
            **where,
        )
    if type == "ia3":
        attach_ia3(model.model, **where)
    elif type == "bottleneck":
        attach_bottlenecks(model.model, r=r, last_layers=last_layers, seed=seed)
    elif type in VIRTUAL_TOKEN_TYPES:
        attach_virtual_tokens(
            model.model,
            kind=type,  # type: ignore[arg-type]  # one of VIRTUAL_TOKEN_TYPES
            num_tokens=num_tokens,
            text=text,
            encoder=encoder,
            encoder_hidden=encoder_hidden,
            tokenizer=tokenizer,
            seed=seed,
        )
        # Every row has its own virtual tokens in front.
        model.layout = "padded"
    elif r:
        attach_lora(model.model, r=r, alpha=alpha, variant=type, seed=seed, **where)  # type: ignore[arg-type]
    return None

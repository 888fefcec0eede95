"""Tiny models with each kind of adapter, moved away from its start, and a task that all of them can learn."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from tiny import write_tiny_model

from alignment import adapters, forward, models
from alignment.engines.torch import TorchEngine
from alignment.learners.base import begin_update, finish_update

SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "alpha": 8},
    "rslora": {"r": 4, "alpha": 8},
    "dora": {"r": 4, "alpha": 8},
    "pissa": {"r": 4, "alpha": 8},
    "adalora": {"r": 4, "alpha": 8, "target_r": 2},
    "ia3": {},
    "bottleneck": {"r": 4},
    "prompt": {"num_tokens": 5},
    "p_tuning": {"num_tokens": 5},
    "prefix": {"num_tokens": 5},
    "p_tuning_v2": {"num_tokens": 5},
    "half": {},
}
MERGED = ("lora", "rslora", "dora", "pissa", "adalora", "ia3")
VIRTUAL = ("prompt", "p_tuning", "prefix", "p_tuning_v2")
IDS = torch.tensor([[3, 7, 11, 19, 23, 5, 40, 8], [9, 4, 77, 6, 31, 12, 50, 2]])
MASK = torch.tensor([[1] * 8, [1] * 6 + [0] * 2])


def write_model(folder: Path, kind: str = "llama", **changes: int) -> Path:
    """A tiny model whose biases are not zero either."""
    write_tiny_model(folder, kind, **changes)
    model = models.load_causal_lm(str(folder)).model
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def attached(folder, kind: str, *, seed: int = 7, total_updates: int = 20, load: Any = None, **changes: Any):
    """(model, training method) of a kind."""
    model = (load or models.load_causal_lm)(str(folder))
    settings = settings_of(kind, **changes)
    return model, adapters.attach(model, type=kind, seed=seed, total_updates=total_updates, **settings)


def settings_of(kind: str, **changes: Any) -> dict[str, Any]:
    """What `attach` takes of a kind, its budget and virtual tokens put together."""
    settings = SETTINGS[kind] | changes
    for key, record in (("budget", adapters.RankBudget), ("virtual_tokens", adapters.TokenSettings)):
        own = {field.name for field in dataclasses.fields(record)} & settings.keys()
        if own:
            settings[key] = record(**{name: settings.pop(name) for name in own})
    return settings


def moved(folder, kind: str, **changes: Any) -> models.HfModel:
    """A model whose adapter is away from its start."""
    model, _ = attached(folder, kind, **changes)
    move(model)
    return model


@torch.no_grad()
def move(model: models.HfModel, by: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((by * noise).to(parameter.dtype))


def hidden(model: models.HfModel, ids: torch.Tensor = IDS, mask: torch.Tensor = MASK) -> torch.Tensor:
    """(real tokens, d), without gradient."""
    with torch.no_grad():
        return model.hidden(ids, mask)[mask.bool()]


def logits(model: models.HfModel) -> torch.Tensor:
    return model.head(hidden(model))


def loss_of(model: models.HfModel, rows: slice = slice(None)) -> torch.Tensor:
    """Summed next-token loss of the real tokens."""
    ids, mask = IDS[rows], MASK[rows]
    return -forward.response_logprobs(model, ids, mask, mask.bool(), temperature=1.0)[0].sum()


def engine_of(model: models.HfModel, *, lr: float = 1e-2, total_updates: int = 20) -> TorchEngine:
    return TorchEngine(model.named_parameters(), lr=lr, total_updates=total_updates)


def train(model, engine, method, updates: int) -> list[float]:
    """The loss before each update."""
    losses = []
    for _ in range(updates):
        begin_update(engine, method)
        loss = loss_of(model) / MASK.sum()
        engine.backward(loss)
        finish_update(engine, method)
        losses.append(float(loss.detach()))
    return losses


def named(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}

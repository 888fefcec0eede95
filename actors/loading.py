"""Configs -> models and optimisers: where the actors' configs stop and plain arguments begin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from alignment import adapters, checkpoint, models
from alignment.adapters import TrainingMethod
from alignment.config import (
    AdapterConfig,
    CriticConfig,
    LiveTrainingConfig,
    ModelConfig,
    PolicyConfig,
    PreferenceStepsConfig,
    RewardModelTrainingConfig,
    SftTrainingConfig,
)
from alignment.config.cluster import RoleConfig
from alignment.data.chat import load_tokenizer
from alignment.data.model_assets import model_file, read_weight
from alignment.distributed import Ranks
from alignment.engines.base import Engine
from alignment.engines.fsdp import split_over_ranks
from alignment.engines.make import make_engine
from alignment.quantization import Quantization

LEARNER_FILE = "learner.pt"
Trained = (
    PolicyConfig
    | CriticConfig
    | RewardModelTrainingConfig
    | SftTrainingConfig
    | PreferenceStepsConfig
    | LiveTrainingConfig
)
"""The settings of whatever learns: its adapter, its optimiser, its micro-batches."""


class Learner(Protocol):
    """What of a learner goes into a checkpoint beside the weights."""

    engine: Engine

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def causal_model(
    path: str, config: ModelConfig, device: str, *, frozen: bool = False, quantization: Quantization = "none"
) -> models.HfModel:
    """A language model as configured; `frozen` for those that never learn."""
    model = models.load_causal_lm(
        path,
        dtype=models.DTYPES[config.dtype],
        attention=config.attention,
        layout=config.batch_layout,
        revision=config.revision,
        device=device,
        quantization=quantization,
    )
    return model.requires_grad_(False) if frozen else model


def split_frozen(model: models.HfModel, lockstep: Ranks | None) -> models.HfModel:
    """Leave each rank with its part of a model that does not learn, if there are ranks to share it."""
    if lockstep is not None:
        split_over_ranks(model)
    return model


def scalar_model(
    path: str,
    config: ModelConfig,
    device: str,
    *,
    head: models.HeadStart,
    seed: int = 0,
    frozen: bool = False,
    quantization: Quantization = "none",
) -> models.HfModel:
    """A backbone with a scalar head as configured."""
    model = models.load_scalar_model(
        path,
        dtype=models.DTYPES[config.dtype],
        attention=config.attention,
        layout=config.batch_layout,
        revision=config.revision,
        device=device,
        head=head,
        seed=seed,
        quantization=quantization,
    )
    return model.requires_grad_(False) if frozen else model


def make_trainable(
    model: models.HfModel,
    settings: ModelConfig,
    trained: Trained,
    *,
    total_updates: int,
    seed: int,
    ranks: Ranks,
    machines: RoleConfig,
    device: str,
    tokenizer: Any | None = None,
    calibrate: Callable[[], None] | None = None,
) -> tuple[Engine, TrainingMethod | None]:
    """Attach the adapter, if one is asked for, and return the optimiser of what is left to train, and what the
    learner has to tell of its updates.

    Args:
        tokenizer: the model's, for virtual tokens that start from a text.
        calibrate: moves the adapter to where it begins, on the first rank for all.
    """
    optimizer = trained.optimizer
    method = attach_adapter(model, trained.adapter, total_updates=total_updates, seed=seed, tokenizer=tokenizer)
    if calibrate is not None and ranks.rank == 0:
        calibrate()
    adapters.share_start(model.model, ranks)
    if settings.gradient_checkpointing:
        models.enable_gradient_checkpointing(model)
    engine = make_engine(
        model,
        ranks=ranks,
        engine=machines.engine,
        zero_stage=machines.zero_stage,
        offload=machines.offload,
        device=device,
        lr=optimizer.lr,
        total_updates=total_updates,
        betas=optimizer.betas,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        warmup_ratio=optimizer.warmup_ratio,
        decay=optimizer.decay,
        min_lr_ratio=optimizer.min_lr_ratio,
        max_grad_norm=optimizer.max_grad_norm,
        max_skipped_in_a_row=optimizer.max_skipped_in_a_row,
    )
    return engine, method


def tokenizer_of_text(adapter: AdapterConfig, path: str, revision: str | None) -> Any | None:
    """The model's tokenizer where its virtual tokens start from a text; None where nobody asks for it."""
    return None if adapter.virtual_tokens.text is None else load_tokenizer(path, revision)


def original_weights(path: str, revision: str | None) -> Callable[[str], Tensor]:
    """From a layer's name to its weight in the model's files, which a four-bit model no longer has."""
    folder = model_file(path, "config.json", revision).parent
    return lambda name: read_weight(folder, f"{name}.weight")


def attach_adapter(
    model: models.HfModel, adapter: AdapterConfig, *, total_updates: int, seed: int, tokenizer: Any | None = None
) -> TrainingMethod | None:
    """`adapters.attach` as configured."""
    return adapters.attach(
        model,
        type=adapter.type,
        seed=seed,
        total_updates=total_updates,
        tokenizer=tokenizer,
        r=adapter.r,
        alpha=adapter.alpha,
        target_modules=adapter.target_modules,
        last_layers=adapter.last_layers,
        budget=adapters.RankBudget(**adapter.budget.model_dump()),
        virtual_tokens=adapters.TokenSettings(**adapter.virtual_tokens.model_dump()),
        pissa_iterations=adapter.pissa_iterations,
        half_round=adapter.half_round,
    )


def save_trained(
    model: models.HfModel, learner: Learner, folder: Path, base: str, tokenizer: Any | None = None
) -> None:
    """The trained part, an adapter in peft's format or the whole model in Hugging Face's, and the learner's state.

    All ranks take part, the first one writes; whatever splits the model, the files are the same.
    """
    write = learner.engine.ranks.rank == 0
    if adapters.has_adapter(model.model):
        adapters.save_adapter(model.model, folder, base=base, write=write)
    else:
        models.save_model(model, folder, tokenizer, write=write)
    state = learner.state_dict()
    if write:
        checkpoint.save_state(folder / LEARNER_FILE, state)


def load_trained(model: models.HfModel, learner: Learner, folder: Path) -> None:
    """Put back what `save_trained` wrote, bit for bit."""
    if adapters.has_adapter(model.model):
        adapters.load_adapter(model.model, folder)
    else:
        models.load_weights(model, folder)
    learner.load_state_dict(checkpoint.load_state(folder / LEARNER_FILE))

"""Models, adapters and optimisers: what every training stage has."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from alignment.config.base import Config, Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat
from alignment.packing import Layout, MicroBatchLimit


class ModelConfig(Config):
    """A causal language model."""

    path: str = "asset:smollm2-135m-instruct"
    """Hugging Face folder, hub name, or `asset:NAME`."""
    revision: str | None = None
    """Commit hash of a hub model; reaches its weights, config and tokenizer."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Weights and matrix products; losses are float32 whatever this is. float16 is for inference only."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """`auto` takes flash-attn when it is installed and the device and dtype fit, else SDPA."""
    batch_layout: Literal["auto", "padded", "packed"] = "auto"
    """How the sequences of a micro-batch lie in a forward. `padded`: each in a row as long as the longest. `packed`:
    end to end in as few rows as hold them, none seeing another; with flash-attn in a single one. `auto` packs where
    the architecture allows it. A token budget counts what is left to compute."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    def at(self, path: str, revision: str | None) -> ModelConfig:
        """These settings for the model in `path`: its own revision, or this one's when it is the same repository."""
        inherited = self.revision if path == self.path else None
        return self.model_copy(update={"path": path, "revision": revision or inherited})


class AdapterConfig(Config):
    """LoRA. `r: 0` trains every parameter."""

    r: NonNegative = 0
    """Rank; 0 means full fine-tuning."""
    alpha: PositiveFloat = 32.0
    """Scale: the update is multiplied by alpha / r."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Module names that get an adapter."""
    last_layers: Positive | None = None
    """Adapt only this many layers, counted from the top: the backward pass stops below them."""
    quantization: Literal["none", "nf4"] = "none"
    """How the frozen weights below the adapter are stored; `nf4` in four bits with double quantization (QLoRA,
    Dettmers 2023), a policy's reference likewise. Needs the extra `qlora`."""

    @model_validator(mode="after")
    def _something_is_frozen(self) -> AdapterConfig:
        if self.quantization != "none" and not self.r:
            raise ValueError(
                f"adapter.quantization: got {self.quantization} with adapter.r=0, which trains the weights "
                "themselves, expected an adapter; set adapter.r, or quantization to none"
            )
        return self


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Config):
    """AdamW, warm-up and decay; counts optimiser steps."""

    lr: PositiveFloat = 1e-5
    """Peak learning rate."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's."""
    eps: PositiveFloat = 1e-8
    """AdamW's."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled, on matrices only."""
    warmup_ratio: Fraction = 0.05
    """Share of all optimiser steps with a rising rate; the first rate is above 0."""
    decay: Literal["constant", "linear", "cosine"] = "linear"
    """Shape after warm-up."""
    min_lr_ratio: Fraction = 0.1
    """Floor of the decay as a share of `lr`."""
    max_grad_norm: PositiveFloat = 1.0
    """Global gradient clipping; a non-finite norm skips the step and is counted."""
    max_skipped_in_a_row: Positive = 3
    """Skipped steps in a row that end the run."""
    adaptive_kl_target: PositiveFloat | None = None
    """KL per token between old and new policy that the rate steers towards (policy only); None switches it off.
    It reads the KL of a batch's last minibatch, after the earlier steps, so it needs several steps per batch."""
    adaptive_bounds: tuple[PositiveFloat, PositiveFloat] = (0.1, 4.0)
    """Limits of the KL-adaptive factor on the rate."""

    @field_validator("adaptive_bounds")
    @classmethod
    def _bounds_are_in_order(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        low, high = bounds
        if low > high:
            raise ValueError(f"got [{low:g}, {high:g}], expected the lower one first; swap them")
        return bounds


class MicroBatchConfig(Config):
    """What one forward may hold. It decides memory and speed, never a result."""

    default_rows: ClassVar[int] = 4

    micro_batch_size: Positive | None = None
    """Sequences per forward on one worker, at most. None is 4, and no bound beside max_tokens_per_micro_batch."""
    max_tokens_per_micro_batch: Positive | None = None
    """Tokens per forward on one worker, at most: all that it computes, padding included. None does not bound."""

    def micro_batch_limit(self, layout: Layout = "padded") -> MicroBatchLimit:
        """Both bounds as one value, for a model that lays its rows out like that."""
        rows, tokens = self.micro_batch_size, self.max_tokens_per_micro_batch
        unset = self.default_rows if tokens is None else None
        return MicroBatchLimit(rows=rows or unset, tokens=tokens, layout=layout)


def refuse_small_budget(settings: MicroBatchConfig, section: str, needed: int, what: str) -> None:
    """A forward holds a whole sequence, or a pair of them."""
    budget = settings.max_tokens_per_micro_batch
    if budget is not None and budget < needed:
        raise ValueError(
            f"{section}.max_tokens_per_micro_batch: got {budget}, expected at least the {needed} of {what}; raise it"
        )


def refuse_float16_training(model: ModelConfig) -> None:
    """Gradients underflow in float16 unless the loss is scaled, which no learner does."""
    if model.dtype == "float16":
        raise ValueError(
            "model.dtype: got float16, expected float32 or bfloat16: gradients in float16 underflow without loss "
            "scaling; use bfloat16"
        )


def refuse_adaptive_rate(optimizer: OptimizerConfig, key: str) -> None:
    """Only a policy has the KL that this rate follows."""
    if optimizer.adaptive_kl_target is not None:
        raise ValueError(
            f"{key}.adaptive_kl_target: got {optimizer.adaptive_kl_target:g}, expected null: only the policy has a KL "
            "to follow; remove it"
        )

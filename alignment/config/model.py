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
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Weights and matrix products; losses, and what is trained, are float32 whatever this is. `auto` is bfloat16 where
    the machines multiply it natively (GPUs, processors with AVX-512 BF16 or AMX), float32 elsewhere; a recipe settles
    it before anything starts. float16 is for inference only."""
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


AdapterType = Literal[
    "lora",
    "rslora",
    "dora",
    "pissa",
    "adalora",
    "ia3",
    "bottleneck",
    "prefix",
    "p_tuning",
    "p_tuning_v2",
    "prompt",
    "half",
]
RANK_TYPES = ("lora", "rslora", "dora", "pissa", "adalora", "bottleneck")
PREFIX_TYPES = ("prefix", "p_tuning_v2")
VIRTUAL_TOKEN_TYPES = (*PREFIX_TYPES, "prompt", "p_tuning")
MERGEABLE_TYPES = ("lora", "rslora", "dora", "pissa", "adalora", "ia3", "half")


class RankBudgetConfig(Config):
    """How `type: adalora` moves rank to where it matters (Zhang 2023): all matrices start with `adapter.r`."""

    target_r: Positive = 8
    """Mean rank of a matrix at the end; less than adapter.r."""
    warmup_share: Fraction = 0.1
    """Share of all updates before the first singular value goes."""
    final_share: Fraction = 0.3
    """Share of all updates after the last one went."""
    interval: Positive = 1
    """Updates from one allocation to the next."""
    orthogonality: NonNegativeFloat = 0.5
    """Weight of the penalty that keeps singular vectors orthogonal."""

    @model_validator(mode="after")
    def _something_is_left_to_allocate(self) -> RankBudgetConfig:
        if self.warmup_share + self.final_share >= 1:
            raise ValueError(
                f"budget: got warmup_share {self.warmup_share:g} + final_share {self.final_share:g}, expected less "
                "than 1: the budget falls in between; lower one of them"
            )
        return self


class VirtualTokensConfig(Config):
    """What `prompt`, `p_tuning`, `prefix` and `p_tuning_v2` put in front of every sequence."""

    num_tokens: Positive = 20
    """Tokens; they take as many positions of the model."""
    text: Annotated[str, Field(min_length=1)] | None = None
    """What `prompt` and `p_tuning_v2` start from, cut or repeated to `num_tokens`; None draws tokens of the
    vocabulary."""
    encoder: Literal["mlp", "lstm"] = "mlp"
    """Of p_tuning: what turns trained embeddings into virtual tokens. Only its output is kept in the end."""
    encoder_hidden: Positive | None = None
    """Width of the encoder of p_tuning and prefix; None is the model's."""


class AdapterConfig(Config):
    """What is trained beside frozen weights, or of them. `type: lora, r: 0` trains every parameter."""

    type: AdapterType = "lora"
    """The method; docs/peft.md compares them. Low rank: lora, rslora, dora, pissa, adalora. Vectors: ia3. Layers:
    bottleneck. In front of the sequence: prompt, p_tuning, prefix, p_tuning_v2. `half` trains half of the matrices of
    each layer at a time."""
    r: NonNegative = 0
    """Rank, or width of a bottleneck; 0 with lora means full fine-tuning. Types without a rank do not read it."""
    alpha: PositiveFloat = 32.0
    """Scale of the low-rank types: the update is multiplied by alpha / r (rslora: alpha / sqrt(r))."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Module names that get an adapter, for the low-rank types and ia3. `all-linear` with ia3 means keys, values and
    the feed-forward's last matrix."""
    last_layers: Positive | None = None
    """Adapt only this many layers, counted from the top: the backward pass stops below them. Not for types that work
    in front of the sequence."""
    quantization: Literal["none", "nf4"] = "none"
    """How the frozen weights below the adapter are stored; `nf4` in four bits with double quantization (QLoRA,
    Dettmers 2023), a policy's reference likewise. Not for pissa and half, which change the weights themselves. Needs
    the extra `qlora`."""
    budget: RankBudgetConfig = RankBudgetConfig()
    """Read by adalora."""
    virtual_tokens: VirtualTokensConfig = VirtualTokensConfig()
    """Read by prompt, p_tuning, prefix and p_tuning_v2."""
    pissa_iterations: Positive | None = None
    """Read by pissa: subspace iterations of a fast decomposition, 16 say, for large models; None decomposes exactly,
    which takes 0.1 s per matrix of 600 x 1,500 and grows with the cube of the width."""
    half_round: Positive | None = None
    """Updates after which `half` trains the other half; None is half of the run."""

    @property
    def enabled(self) -> bool:
        """Whether the base stays as it is beside something that can be switched off. Not so with `half`."""
        return self.type != "half" and (self.type != "lora" or self.r > 0)

    @property
    def served_alone(self) -> bool:
        """Whether vLLM samples with the adapter beside its own base; the others it is sent merged."""
        return self.enabled and self.type in ("lora", "rslora")

    @model_validator(mode="after")
    def _rank_is_there(self) -> AdapterConfig:
        if self.type in RANK_TYPES and self.type != "lora" and not self.r:
            raise ValueError(
                f"adapter.r: got 0 with adapter.type={self.type}, expected a rank above 0; set adapter.r, "
                "or type to lora, which with r=0 trains every parameter"
            )
        if self.type == "adalora" and self.budget.target_r >= self.r:
            raise ValueError(
                f"adapter.budget.target_r: got {self.budget.target_r} with adapter.r={self.r}, expected less: ranks "
                "start at adapter.r and fall; raise adapter.r, or lower target_r"
            )
        return self

    @model_validator(mode="after")
    def _something_is_frozen(self) -> AdapterConfig:
        if self.quantization == "none":
            return self
        if self.type in ("pissa", "half"):
            raise ValueError(
                f"adapter.quantization: got {self.quantization} with adapter.type={self.type}, which changes the "
                "weights below, expected none; set quantization to none, or type to lora, rslora or dora"
            )
        if not self.enabled:
            raise ValueError(
                f"adapter.quantization: got {self.quantization} with adapter.r=0, which trains the weights "
                "themselves, expected an adapter; set adapter.r, or quantization to none"
            )
        return self

    @model_validator(mode="after")
    def _text_is_read(self) -> AdapterConfig:
        if self.virtual_tokens.text is not None and self.type not in ("prompt", "p_tuning_v2"):
            raise ValueError(
                f"adapter.virtual_tokens.text: got one with adapter.type={self.type}, expected prompt or p_tuning_v2, "
                "which alone start from a text; remove it, or set type to one of them"
            )
        if self.last_layers is not None and self.type in VIRTUAL_TOKEN_TYPES:
            raise ValueError(
                f"adapter.last_layers: got {self.last_layers} with adapter.type={self.type}, expected null: virtual "
                "tokens pass through every layer; remove it"
            )
        return self


def refuse_unmergeable(adapter: AdapterConfig, section: str, why: str) -> None:
    """Of a model that others receive as plain weights."""
    if adapter.type not in MERGEABLE_TYPES:
        raise ValueError(
            f"{section}.adapter.type: got {adapter.type}, expected one of {', '.join(MERGEABLE_TYPES)}: {why}; "
            "choose one of them"
        )


def refuse_adapter_for_model(model: ModelConfig, adapter: AdapterConfig, section: str) -> None:
    """Virtual tokens stand in front of padded rows, and those of the prefix types in a cache."""
    if adapter.type in VIRTUAL_TOKEN_TYPES and model.batch_layout == "packed":
        raise ValueError(
            f"model.batch_layout: got packed with {section}.adapter.type={adapter.type}, expected padded: every "
            "sequence has virtual tokens of its own in front; set it to auto"
        )
    if adapter.type in PREFIX_TYPES and model.gradient_checkpointing:
        raise ValueError(
            f"model.gradient_checkpointing: got true with {section}.adapter.type={adapter.type}, expected false: a "
            "layer that is computed again drops the cached keys and values, so nothing would be trained; set it to "
            "false, or type to prompt or p_tuning"
        )


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


def refuse_idle_patience(patience: int | None, validate_every: int) -> None:
    """Patience counts validations."""
    if patience is not None and not validate_every:
        raise ValueError(
            f"training.patience: got {patience} with training.validate_every=0, expected validations to count; set "
            "training.validate_every, or remove patience"
        )


def refuse_adaptive_rate(optimizer: OptimizerConfig, key: str) -> None:
    """Only a policy has the KL that this rate follows."""
    if optimizer.adaptive_kl_target is not None:
        raise ValueError(
            f"{key}.adaptive_kl_target: got {optimizer.adaptive_kl_target:g}, expected null: only the policy has a KL "
            "to follow; remove it"
        )

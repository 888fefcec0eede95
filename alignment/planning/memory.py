"""Memory of one role, in bytes: weights, optimiser, activations, logits, cache. Arithmetic on a shape.

ZeRO's stages (Rajbhandari 2020, arXiv 1910.02054) divide by the ranks: 1 the optimiser's states, 2 gradients as well,
3 weights as well, gathered a layer at a time. torch's FSDP2 divides all of them; with stage 2 a layer stays gathered
from its forward to its backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from alignment.packing import MicroBatchLimit
from alignment.planning import activations
from alignment.planning.shape import ModelShape

MB = 2**20
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
CHUNK_SIZE = 512
"""As in `alignment.logprobs`; a test compares."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Per weight: four bits, a byte of scale for 64, and a float32 for 256 of those (Dettmers 2023, section 3)."""
HEAP_SHARE = 0.7
"""On a CPU: of what is allocated between longer-lived blocks and freed, the share that glibc cannot use again: an
aligned block asks for a hole larger than the one that an equal block left. Measured, see docs/planner.md."""
LIVE_WEIGHTS = 1_000_000_000
"""Weights that DeepSpeed's stage 3 leaves gathered for their next use: its own default."""
CUDA_SHARE = 0.05
"""On a GPU: what torch's caching allocator holds beyond what is alive, as a share of it. An assumption."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """What goes through a model at one time."""

    rows: float
    """Sequences of the longest kind that come to as many tokens: with a budget not always a whole number."""
    longest: int
    """Tokens of the longest row."""
    answer: int
    """Of those, response tokens: the positions with logits."""

    @property
    def tokens(self) -> float:
        """All that a forward computes, padding included."""
        return self.rows * self.longest


def largest_micro_batch(
    limit: MicroBatchLimit, *, available: int, longest: int, answer: int, sequences: int = 1
) -> MicroBatch:
    """The most that `limit` lets through of `available` rows of up to `longest` tokens.

    Packed or padded, a budget counts the tokens that are computed: full of shorter sequences it is full all the same.

    Args:
        sequences: of one row; 2 for pairs.
    """
    rows = sequences * min(available, limit.rows or available)
    if limit.tokens is None:
        return MicroBatch(rows=rows, longest=longest, answer=answer)
    # One row goes through whatever it takes.
    return MicroBatch(rows=min(rows, max(sequences, limit.tokens / longest)), longest=longest, answer=answer)


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """How a model is trained, as far as memory and time depend on it."""

    r: int = 0
    """LoRA's rank; 0 trains every weight. Of other adapters, the rank at which LoRA keeps about as much."""
    added: int | None = None
    """Weights that another adapter than LoRA trains; None counts LoRA's by its rank."""
    target_modules: tuple[str, ...] | str = "all-linear"
    last_layers: int | None = None
    quantization: str = "none"
    checkpointing: bool = False
    accumulates: bool = True
    """More than one micro-batch per optimiser step: gradients are there while the next one's activations are."""
    ranks: int = 1
    engine: str = "torch"
    zero_stage: int = 0
    offload: str = "none"

    @property
    def shards_weights(self) -> bool:
        """Whether a rank holds a part of the weights only. FSDP2 has no other way to split."""
        if self.engine == "torch":
            return self.ranks > 1 and self.zero_stage >= 2
        return self.zero_stage >= 3


@dataclass(frozen=True, kw_only=True, slots=True)
class RoleMemory:
    """Bytes of one role in one process."""

    weights: float = 0.0
    """At rest."""
    gathered: float = 0.0
    """Of split weights, what is whole while a pass runs."""
    masters: float = 0.0
    moments: float = 0.0
    gradients: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    cache: float = 0.0
    """Keys and values, and on a CPU the packed matrices of decoding."""
    spare: float = 0.0
    """What the allocator holds and cannot use."""
    host: float = 0.0
    """Of a role on a GPU, in the host's memory: what is offloaded."""
    apart: float = 0.0
    """Of the gradients, what is not there yet while activations are at their peak."""

    @property
    def held(self) -> float:
        """Between calls."""
        return self.weights + self.masters + self.moments

    @property
    def passing(self) -> float:
        """At the peak of a call, on top of `held`. Roles of one process take turns at it."""
        return self.gathered + self.gradients + self.activations + self.logits + self.cache + self.spare - self.apart

    @property
    def total(self) -> float:
        return self.held + self.passing


COLUMNS = tuple(f.name for f in fields(RoleMemory) if f.name not in ("apart", "host"))


def weight_bytes(shape: ModelShape, *, dtype: str, quantization: str = "none", scalar_head: bool = False) -> float:
    """Of a model at rest. Four bits are for the layers' matrices: embedding, norms and head stay as they are."""
    width, count = WIDTHS[dtype], shape.num_parameters(scalar_head=scalar_head)
    if quantization == "none":
        return count * width
    quantized = shape.layers * sum(matrix.weights for matrix in shape.matrices)
    return quantized * NF4_BYTES + (count - quantized) * width


def trained_parameters(shape: ModelShape, training: Training, *, scalar_head: bool) -> int:
    """Weights that the optimiser steps on: all, or the adapters and a scalar head."""
    if not training.r:
        return shape.num_parameters(scalar_head=scalar_head)
    adapters = training.added
    if adapters is None:
        adapters = shape.adapter_parameters(training.r, training.target_modules, training.last_layers)
    return adapters + (shape.hidden if scalar_head else 0)


def learner_memory(
    shape: ModelShape,
    training: Training,
    micro: MicroBatch,
    *,
    dtype: str,
    scalar_head: bool,
    scaled: bool = False,
    entropy: bool = False,
    on_gpu: bool = False,
) -> RoleMemory:
    """A role that learns: the peak over forward, backward and optimiser step.

    Args:
        scalar_head: a critic or reward model, which has no logits.
        scaled: the temperature is not 1.
    """
    width = WIDTHS[dtype]
    count = trained_parameters(shape, training, scalar_head=scalar_head)
    states = split_states(shape, training, count, dtype=dtype, scalar_head=scalar_head, on_gpu=on_gpu)
    gradients = states.gradients
    kept = activations.saved_bytes(
        shape,
        rows=micro.rows,
        longest=micro.longest,
        width=width,
        r=training.r,
        target_modules=training.target_modules,
        last_layers=training.last_layers,
        checkpointing=training.checkpointing,
    )
    kept += activations.forward_bytes(shape, rows=micro.rows, longest=micro.longest, width=width) / 3
    logits = 0.0
    if not scalar_head:
        logits = activations.logits_bytes(
            shape,
            positions=micro.rows * micro.answer,
            width=width,
            chunk=CHUNK_SIZE,
            scaled=scaled,
            entropy=entropy,
            training=True,
        )
    # The head's gradient waits for the embedding's, with which it is added up.
    embedding = 0.0 if training.r else shape.embedding * width
    logits += 0.0 if scalar_head else embedding
    apart = 0.0
    if not training.accumulates:
        # Gradients come as activations go: the higher of the two ends counts.
        apart = min(gradients, kept + logits)
        apart -= min(apart, 2 * embedding)
    if on_gpu:
        spare = CUDA_SHARE * (kept + logits)
    else:
        passing = passing_of_layers(shape, training, micro, width=width)
        spare = HEAP_SHARE * (passing + gradients + logits)
        spare += file_pages(shape, training, width=width)
    return replace(states, activations=kept, logits=logits, spare=spare, apart=apart)


def split_states(
    shape: ModelShape, training: Training, count: int, *, dtype: str, scalar_head: bool, on_gpu: bool = False
) -> RoleMemory:
    """What one rank holds of weights and optimiser: 4 bytes of gradient and 8 of moments per trained weight, 4 of
    master where it is not float32 itself (see `alignment.engines.torch`).

    Args:
        count: trained weights.
        on_gpu: what is offloaded has somewhere else to go.
    """
    width, stage = WIDTHS[dtype], training.zero_stage
    deepspeed = training.engine == "deepspeed"
    # Stage 1 and above of DeepSpeed step on a copy of their part, of float32 weights too.
    masters = 4.0 * count * (width < 4 or (deepspeed and stage >= 1))
    gradients, moments = 4.0 * count, 8.0 * count
    weights = weight_bytes(shape, dtype=dtype, quantization=training.quantization, scalar_head=scalar_head)
    weights += count * width if training.r else 0
    gathered = 0.0
    if training.shards_weights:
        if deepspeed:
            gathered = max(whole_at_once(shape, width, scalar_head=scalar_head), min(weights, LIVE_WEIGHTS * width))
        else:
            gathered = weights if stage == 2 else whole_at_once(shape, width, scalar_head=scalar_head)
    whole, parts = 1, training.ranks
    states = RoleMemory(
        weights=weights / (parts if training.shards_weights else whole),
        gathered=gathered,
        masters=masters / (parts if stage >= 1 else whole),
        moments=moments / (parts if stage >= 1 else whole),
        gradients=gradients / (parts if stage >= 2 else whole),
    )
    return offloaded(states, training) if on_gpu else states


def whole_at_once(shape: ModelShape, width: int, *, scalar_head: bool) -> float:
    """Bytes of split weights that are whole at a time: one layer, and what no layer holds, embedding and head."""
    return width * (shape.num_parameters(scalar_head=scalar_head) - (shape.layers - 1) * shape.layer)


def offloaded(states: RoleMemory, training: Training) -> RoleMemory:
    """Masters and moments on the host, gradients beside them where they are split; with `all` weights too."""
    names = {"none": [], "optimizer": ["masters", "moments"], "all": ["masters", "moments", "weights"]}[
        training.offload
    ]
    if names and training.zero_stage >= 2:
        names.append("gradients")
    host = sum(getattr(states, name) for name in names)
    return replace(states, host=host, **dict.fromkeys(names, 0.0))


def passing_of_layers(shape: ModelShape, training: Training, micro: MicroBatch, *, width: int) -> float:
    """What a forward pass allocates and frees between what it keeps: in every layer that keeps something."""
    targets = shape.targets(training.target_modules) if training.r else ()
    one = activations.passing_bytes(shape, rows=micro.rows, longest=micro.longest, width=width, targets=targets)
    if training.quantization != "none":
        # Each matrix is multiplied with as numbers of the model's dtype.
        one += width * sum(matrix.weights for matrix in shape.matrices)
    layers = shape.adapted_layers(training.last_layers) if training.r else shape.layers
    return one * (1 if training.checkpointing else layers)


def file_pages(shape: ModelShape, training: Training, *, width: int) -> float:
    """On a CPU: pages of the model's file that were read to be rounded. They stay mapped beside the embedding, which
    lies in the same file, and count as resident, though the kernel may drop them."""
    if training.quantization == "none":
        return 0.0
    return width * shape.layers * sum(matrix.weights for matrix in shape.matrices)


def scorer_memory(
    shape: ModelShape,
    micro: MicroBatch,
    *,
    dtype: str,
    scalar_head: bool,
    quantization: str = "none",
    scaled: bool = False,
    shares_weights: bool = False,
    parts: int = 1,
) -> RoleMemory:
    """A role that only runs forward: the reference, a reward model.

    Args:
        parts: workers that the weights are split over, by FSDP2.
    """
    width = WIDTHS[dtype]
    logits = 0.0
    if not scalar_head:
        logits = activations.logits_bytes(
            shape,
            positions=micro.rows * micro.answer,
            width=width,
            chunk=CHUNK_SIZE,
            scaled=scaled,
            entropy=False,
            training=False,
        )
    weights = weight_bytes(shape, dtype=dtype, quantization=quantization, scalar_head=scalar_head)
    return RoleMemory(
        weights=0.0 if shares_weights else weights / parts,
        gathered=whole_at_once(shape, width, scalar_head=scalar_head) if parts > 1 and not shares_weights else 0.0,
        activations=activations.forward_bytes(shape, rows=micro.rows, longest=micro.longest, width=width),
        logits=logits,
    )


def one_after_the_other(models: Sequence[RoleMemory]) -> RoleMemory:
    """Frozen models of one role: held side by side, and run in turn."""
    largest = max(models, key=lambda one: one.passing)
    return replace(largest, weights=sum(one.weights for one in models))


def cache_bytes(shape: ModelShape, *, sequences: int, longest: int, width: int) -> int:
    """Keys and values of `sequences` rows of `longest` tokens in every layer."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * width * sequences * longest


def sampler_memory(
    shape: ModelShape, *, sequences: int, longest: int, dtype: str, on_gpu: bool, shares_weights: bool
) -> RoleMemory:
    """The transformers engine: weights, unless they are the policy's, cache, and what picks a token."""
    width = WIDTHS[dtype]
    # On a CPU in float32 the matrices are held once more, packed, while decoding.
    packed = (
        0 if on_gpu or width < 4 else 4 * (shape.layers * sum(m.weights for m in shape.matrices) + shape.embedding)
    )
    return RoleMemory(
        weights=0.0 if shares_weights else weight_bytes(shape, dtype=dtype),
        cache=cache_bytes(shape, sequences=sequences, longest=longest, width=width) + packed,
        logits=3.0 * 8 * sequences * shape.vocab,
        activations=activations.forward_bytes(shape, rows=sequences, longest=longest, width=width),
    )


def vllm_memory(
    shape: ModelShape, *, dtype: str, gpu_bytes: float, memory_share: float, cache_gb: float | None, parallel: int
) -> RoleMemory:
    """vLLM: on a GPU it takes its share of the memory whatever it needs; on a CPU weights and its cache."""
    weights = weight_bytes(shape, dtype=dtype) / parallel
    if gpu_bytes:
        cache = cache_gb * 2**30 if cache_gb is not None else max(0.0, memory_share * gpu_bytes - weights)
        return RoleMemory(weights=weights, cache=cache)
    return RoleMemory(weights=weights, cache=(1.0 if cache_gb is None else cache_gb) * 2**30)

"""What a forward pass keeps for the backward pass, in bytes, derived from the modules of a Llama layer.

The idea of counting what each operation needs for its gradient is Korthikanti 2022 (arXiv 2205.05198, section 4); the
counts are those of transformers' Llama modules with SDPA attention. d is the hidden size, q = heads x head size,
k = key heads x head size, f the feed-forward size, H heads, T tokens of the longest row. Per token and layer, in
numbers of the model's dtype unless it says float32:

| kept | full | LoRA |
|---|---|---|
| two RMS norms: input and 1 / rms, in float32 | 2 d + 2 | 2 d + 2 |
| two RMS norms: what their weight multiplies | 2 d | |
| input of q, k, v (one tensor) | d | d where one of them is adapted |
| queries after rope, keys and values repeated per head | 3 q | 3 q |
| attention's logsumexp, in float32, and its mask | H + T | H + T |
| attention's output, which is the input of o | q | q |
| input of gate and up | d | d where one of them is adapted |
| gate, silu(gate), up | 3 f | 3 f |
| input of down | f | f where it is adapted |
| between A and B of each adapter | | r each |

Layers below the first adapter keep nothing; an adapter on late matrices alone (`down_proj`) also spares most of its
first layer, which is counted in full. With gradient checkpointing every layer keeps its input, d, and one layer
at a time keeps the rest. Where a batch has no padding keys and values are not repeated and there is no mask.
"""

from __future__ import annotations

from collections.abc import Sequence

from alignment.planning.shape import Matrix, ModelShape

FLOAT32 = 4
READERS = {"qkv": ("q_proj", "k_proj", "v_proj", "c_attn"), "mlp": ("gate_proj", "up_proj", "c_fc")}
DOWN = ("down_proj",)


def layer_bytes(
    shape: ModelShape,
    *,
    width: int,
    longest: int,
    r: int = 0,
    targets: Sequence[Matrix] = (),
    padded: bool = True,
) -> float:
    """Bytes per token that one layer keeps for its backward pass.

    Args:
        width: bytes of a number of the model's dtype.
        longest: tokens of the longest row.
        r, targets: LoRA's rank and matrices; r = 0 trains every weight.
        padded: whether rows differ in length.
    """
    d, q, f = shape.hidden, shape.heads * shape.head_dim, shape.intermediate
    keys = q if padded else shape.kv_heads * shape.head_dim
    names = {matrix.name for matrix in targets}
    norms = 2 * (d + 1) * FLOAT32
    numbers = q + q + 2 * keys + 3 * f + (longest if padded else 0)
    if r:
        numbers += sum(d for readers in READERS.values() if names.intersection(readers))
        numbers += f if names.intersection(DOWN) else 0
        numbers += r * len(targets)
    else:
        numbers += 2 * d + 2 * d + f
    return norms + numbers * width + shape.heads * FLOAT32


def outer_bytes(shape: ModelShape, *, width: int, r: int = 0, checkpointing: bool = False) -> float:
    """Bytes per token outside the layers: the last norm, the ids, sine and cosine.

    Under LoRA the last norm stands in for the first norm of the first adapted layer, which keeps nothing, since no
    gradient goes below it; a layer that is checkpointed keeps its input all the same.
    """
    d = shape.hidden
    rope = 2 * shape.head_dim * width
    if r:
        return rope + (d + 1) * FLOAT32 * checkpointing
    return rope + (d + 1) * FLOAT32 + d * width + 8


def saved_bytes(
    shape: ModelShape,
    *,
    rows: float,
    longest: int,
    width: int,
    r: int = 0,
    target_modules: tuple[str, ...] | str = "all-linear",
    last_layers: int | None = None,
    checkpointing: bool = False,
    padded: bool = True,
) -> float:
    """Bytes that a micro-batch of `rows` x `longest` tokens keeps from forward to backward.

    With checkpointing those of the layer that is being computed again come on top: the peak is what counts.
    """
    tokens = rows * longest
    targets = shape.targets(target_modules) if r else ()
    one = layer_bytes(shape, width=width, longest=longest, r=r, targets=targets, padded=padded)
    outer = outer_bytes(shape, width=width, r=r, checkpointing=checkpointing)
    layers = shape.adapted_layers(last_layers) if r else shape.layers
    if checkpointing:
        return tokens * (layers * shape.hidden * width + outer + one)
    return tokens * (layers * one + outer)


def forward_bytes(shape: ModelShape, *, rows: float, longest: int, width: int) -> float:
    """Bytes alive at once in a forward pass without gradient: the residual, a norm, and the feed-forward layer."""
    return rows * longest * width * (2 * shape.hidden + 3 * shape.intermediate)


def passing_bytes(
    shape: ModelShape, *, rows: float, longest: int, width: int, targets: Sequence[Matrix] = ()
) -> float:
    """Bytes that one layer's forward pass allocates between what it keeps, and frees again: rope's parts, keys and
    values before they are repeated, outputs added to the residual, and three outputs of every adapted matrix."""
    q, k = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    repeated = 0 if q == k else 2 * k
    numbers = 4.5 * (q + k) + repeated + 4 * shape.hidden + 3 * sum(matrix.outputs for matrix in targets)
    return rows * longest * width * numbers


def logits_bytes(
    shape: ModelShape, *, positions: float, width: int, chunk: int, scaled: bool, entropy: bool, training: bool
) -> float:
    """Bytes of (positions, V) matrices at their peak: only `chunk` positions exist at a time.

    The head's output, in float32 as well where the model is not, divided by a temperature other than 1, and one more
    for logsumexp (forward) or for the gradient (backward); the entropy needs three more in training.
    """
    copies = width + (FLOAT32 if width < FLOAT32 else 0) + FLOAT32 * scaled + FLOAT32
    copies += 3 * FLOAT32 * (entropy and training)
    return min(positions, chunk) * shape.vocab * copies

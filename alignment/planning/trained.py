"""How many weights each method trains beside a frozen model."""

from __future__ import annotations

from alignment.config.model import AdapterConfig
from alignment.planning.shape import ModelShape


def adapter_weights(shape: ModelShape, adapter: AdapterConfig) -> int:
    """Weights that `alignment.adapters.attach` adds; 0 for full and half fine-tuning, which add none."""
    if not adapter.enabled:
        return 0
    if adapter.type in ("prompt", "p_tuning", "prefix", "p_tuning_v2"):
        return _virtual_tokens(shape, adapter)
    layers = shape.adapted_layers(adapter.last_layers)
    if adapter.type == "ia3":
        return layers * (2 * shape.kv_heads * shape.head_dim + shape.intermediate)
    if adapter.type == "bottleneck":
        return layers * 2 * (2 * shape.hidden * adapter.r + adapter.r + shape.hidden)
    pairs = shape.adapter_parameters(adapter.r, adapter.target_modules, adapter.last_layers)
    targets = shape.targets(adapter.target_modules)
    if adapter.type == "dora":
        return pairs + layers * sum(matrix.outputs for matrix in targets)
    if adapter.type == "adalora":
        return pairs + layers * len(targets) * adapter.r
    return pairs


def _virtual_tokens(shape: ModelShape, adapter: AdapterConfig) -> int:
    tokens, d = adapter.virtual_tokens, shape.hidden
    count, h, keys = tokens.num_tokens, tokens.encoder_hidden or d, shape.kv_heads * shape.head_dim
    if adapter.type == "prompt":
        return count * d
    if adapter.type == "p_tuning_v2":
        return count * shape.layers * 2 * keys
    if adapter.type == "prefix":
        return count * keys + _linear(keys, h) + _linear(h, shape.layers * 2 * keys)
    if tokens.encoder == "mlp":
        return count * d + _linear(d, h) + _linear(h, h) + _linear(h, d)
    # Two layers, each with two directions of four gates and two biases.
    lstm = 2 * 4 * h * (d + h + 2) + 2 * 4 * h * (2 * h + h + 2)
    return count * d + lstm + _linear(2 * h, 2 * h) + _linear(2 * h, d)


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs

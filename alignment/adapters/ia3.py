"""(IA)^3 (Liu 2022, arXiv 2205.05638): vectors that multiply keys, values and the feed-forward's inner activations."""

from __future__ import annotations

from torch import nn

from alignment.adapters.layers import stored_transposed, target_names, train_adapter_only, tuner_layers

KEYS_AND_VALUES = ("k_proj", "v_proj", "key", "value", "c_attn", "query_key_value", "qkv_proj")
"""Last parts of names. A matrix that makes queries as well has them scaled too."""
FEED_FORWARD = ("down_proj", "mlp.c_proj", "fc2", "dense_4h_to_h", "w2")
"""Ends of names: the matrix behind the activation, whose inputs are scaled."""


def attach_ia3(
    model: nn.Module, *, target_modules: tuple[str, ...] | str = "all-linear", last_layers: int | None = None
) -> None:
    """Put the vectors into `model` in place; only they (and a scalar head) stay trainable. All start at 1.

    Args:
        target_modules: "all-linear" means keys, values and the feed-forward's last matrix.

    Raises:
        ValueError: as `ia3_targets`.
    """
    from peft import IA3Config, inject_adapter_in_model

    names, feed_forward = ia3_targets(model, target_modules, last_layers)
    config = IA3Config(
        target_modules=names, feedforward_modules=feed_forward, fan_in_fan_out=stored_transposed(model, names)
    )
    inject_adapter_in_model(config, model)
    for _, layer in tuner_layers(model):
        # peft's have a second dimension, and an optimiser would decay them as it does matrices: towards 0, not 1.
        layer.ia3_l["default"] = nn.Parameter(layer.ia3_l["default"].detach().flatten())
    train_adapter_only(model)


def ia3_targets(
    model: nn.Module, target_modules: tuple[str, ...] | str, last_layers: int | None
) -> tuple[list[str], list[str]]:
    """Full names of the matrices that get a vector, and those of them whose inputs it scales.

    Raises:
        ValueError: the model names none of its layers as known ones are.
    """
    names = target_names(model, target_modules, last_layers)
    if target_modules == "all-linear":
        names = [name for name in names if name.rsplit(".", 1)[-1] in KEYS_AND_VALUES or _feeds_forward(name)]
    feed_forward = [name for name in names if _feeds_forward(name)]
    if target_modules == "all-linear" and (not feed_forward or len(feed_forward) == len(names)):
        raise ValueError(
            f"adapter.type: got ia3 with a model whose layers are named "
            f"{sorted({n.rsplit('.', 1)[-1] for n in target_names(model, 'all-linear', last_layers)})}, expected "
            "keys, values and a feed-forward among them; name them in adapter.target_modules"
        )
    return names, feed_forward


def _feeds_forward(name: str) -> bool:
    return any(name.endswith(f".{end}") for end in FEED_FORWARD)

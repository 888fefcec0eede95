"""What can be told of a model before any weight is read: head, embeddings, adapter, positions, names and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from alignment.adapters import check_targets, target_names
from alignment.config import AdapterConfig, ModelConfig
from alignment.config.model import VIRTUAL_TOKEN_TYPES
from alignment.data.chat import check_vocabulary
from alignment.data.model_assets import model_file, quiet_loading, weight_shapes
from alignment.models import HeadStart, check_scalar_head, num_positions
from alignment.quantization import check_quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_model(
    key: str,
    model: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    adapter: AdapterConfig | None = None,
    *,
    head: HeadStart | None = None,
    lengths: Mapping[str, int] | None = None,
    read_singly: bool = False,
) -> int:
    """Build a model without memory, and refuse what would only fail once its weights are loaded or it is run.

    Args:
        key: its section of the config, for messages.
        model: of a resolved path.
        adapter: whose layers must be there.
        head: None for a language model; for a scalar one as `alignment.models.load_scalar_model`.
        read_singly: whether the weights below the adapter are read from the files by the model's own names.
        lengths: what the longest sequence is made of, in tokens, by the name of the setting.

    Returns:
        The number of parameters.

    Raises:
        ValueError: `key: got ..., expected ...; remedy`.
    """
    try:
        folder = model_file(model.path, "config.json", model.revision).parent
        if head == "require":
            check_scalar_head(str(folder))
        built = _without_memory(model, head)
        check_vocabulary(tokenizer, built.config.get_text_config().vocab_size)
        if adapter is not None:
            check_quantization(adapter.quantization)
        if adapter is not None and adapter.enabled:
            modules, last_layers = adapter.target_modules, adapter.last_layers
            check_targets(built, type=adapter.type, r=adapter.r, target_modules=modules, last_layers=last_layers)
            if read_singly:
                _check_single(
                    folder, {n: built.get_submodule(n).weight for n in target_names(built, modules, last_layers)}
                )
        if adapter is not None and adapter.type in VIRTUAL_TOKEN_TYPES:
            lengths = {**(lengths or {}), "adapter.virtual_tokens.num_tokens": adapter.virtual_tokens.num_tokens}
        _check_positions(model.path, num_positions(built.config), lengths or {})
        _check_weights(folder, built, head)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    return sum(p.numel() for p in {id(p): p for p in built.parameters()}.values())


def _without_memory(model: ModelConfig, head: HeadStart | None) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    kind: Any = AutoModelForCausalLM if head is None else AutoModelForSequenceClassification
    purpose = "a language-model head" if head is None else "a scalar head"
    try:
        config = AutoConfig.from_pretrained(model.path, revision=model.revision)
        if head is not None:
            config.num_labels = 1
        with torch.device("meta"):
            built: PreTrainedModel = kind.from_config(config)
    # What an architecture makes of a config that somebody edited is up to it: whatever it raises is the reason.
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"got {model.path!r}, which cannot be built with {purpose} ({reason[0]}), "
            "expected an architecture that transformers has built in, with a config of its own; choose such a model"
        ) from error
    if head is not None and not isinstance(getattr(built, "score", None), nn.Linear):
        raise ValueError(
            f"got {model.path!r} ({type(built).__name__}), whose head is no linear layer `score`, expected one that "
            "reads the last token's hidden state; choose a decoder such as Llama, Qwen, Mistral or GPT-2"
        )
    return built


def _check_positions(path: str, limit: int | None, lengths: Mapping[str, int]) -> None:
    """The longest sequence must fit: learned positions end there, rotary ones were never trained beyond."""
    longest = sum(lengths.values())
    if limit is not None and longest > limit:
        raise ValueError(
            f"got sequences of up to {longest} tokens ({' + '.join(f'{name} {n}' for name, n in lengths.items())}), "
            f"expected at most the {limit} positions of {path!r}; lower them, or choose a model with more positions"
        )


def _check_weights(folder: Path, built: PreTrainedModel, head: HeadStart | None) -> None:
    """Compare names and shapes in the files with those of the model.

    transformers' own loader does it, on tensors without memory: it knows which names are tied, renamed or merged on
    the way. A quantised folder has names and shapes of its own and is left to it, as is one still on the hub.
    """
    shapes = weight_shapes(folder)
    if not shapes or getattr(built.config, "quantization_config", None) is not None:
        return
    loader: Any = type(built)
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    expected = f"expected the weights of the {loader.__name__} that its config.json describes"
    remedy = "save the model again, or copy the config.json that belongs to these weights"
    try:
        with quiet_loading():
            _, found = loader.from_pretrained(
                None,
                config=built.config,
                state_dict=empty,
                device_map="meta",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"got {folder} with weights that do not fit ({reason}), {expected}; {remedy}") from error
    missing = sorted(set(found["missing_keys"]) - ({"score.weight"} if head in ("zeros", "random") else set()))
    if missing == ["score.weight"]:
        raise ValueError(
            f"got {folder} without score.weight, expected a reward model with a trained head; "
            "train one with recipes/reward_model_medical.py"
        )
    if missing:
        raise ValueError(f"got {folder} without {_some(missing)}, {expected}; {remedy}")
    if found["mismatched_keys"]:
        wrong = [f"{name} of shape {[*got]} for {[*wanted]}" for name, got, wanted in sorted(found["mismatched_keys"])]
        raise ValueError(f"got {folder} with {_some(wrong)}, {expected}; {remedy}")


def _check_single(folder: Path, weights: Mapping[str, Any]) -> None:
    """Whether the files have these layers' weights as the model has them."""
    shapes = weight_shapes(folder)
    others = [name for name, own in weights.items() if shapes and shapes.get(f"{name}.weight") != tuple(own.shape)]
    if others:
        raise ValueError(
            f"training.calibration_examples: got {folder}, whose files do not have {_some(others)} under these names "
            "in these shapes, expected the model's own weights, not quantised ones; set it to 0, or save the model "
            "again with transformers"
        )


def _some(things: list[str]) -> str:
    rest = f" and {len(things) - 3} more" if len(things) > 3 else ""
    return ", ".join(things[:3]) + rest

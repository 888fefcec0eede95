"""Load the four models, each as hidden states first, then only the head that is asked for.

A causal model is used through two calls, `hidden` and `head`, so that logits exist only for the positions that
are needed (see `alignment.forward`). Anything with these two calls can be trained, a tabular policy included.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from alignment.adapters.virtual_tokens import active_virtual_tokens
from alignment.packed import BatchLayout, choose_layout, packed_hidden, saves_tokens
from alignment.packing import Layout
from alignment.quantization import Quantization, keep_precision, loading_arguments
from alignment.sharding import assign, gathered_state_dict

HeadStart = Literal["require", "zeros", "random"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def multiplies_bfloat16() -> bool:
    """Whether this machine's processor has instructions for products in bfloat16; without, they are slower than in
    float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class CausalModel(Protocol):
    """A language model in two halves: (B, T) ids -> (B, T, d) hidden states -> (..., V) logits."""

    def hidden(self, input_ids: Tensor, attention_mask: Tensor, noise: Tensor | None = None) -> Tensor: ...
    def head(self, hidden: Tensor) -> Tensor: ...


def quiet_transformers() -> None:
    """No progress bars and load reports: in a worker's log they drown what matters. Errors still show."""
    if not torch.cuda.is_available():
        # Where it is installed, saving a model imports DeepSpeed, which warns of the missing GPU otherwise.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # Where it is installed, peft imports it, and it asks for a kernel that nothing here uses.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def positions(attention_mask: Tensor) -> Tensor:
    """Position ids that count real tokens only, so that left or right padding gives the same row. (B, T) -> (B, T)."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


class HfModel(nn.Module):
    """A transformers model behind `hidden` and `head`; the weights stay in `model` for saving and adapters."""

    model: Any
    _head: nn.Module
    _entry: Callable[..., Any]

    def __init__(self, model: Any, head: nn.Module, layout: Layout = "padded") -> None:
        """`layout`: how the rows of a batch lie in a forward; no answer depends on it but by rounding."""
        super().__init__()
        self.model, self.layout = model, layout
        # Registered once, inside `model`: a second registration would name the same weights twice in a state dict.
        object.__setattr__(self, "_head", head)
        self.enter_by(self)

    def enter_by(self, entry: Callable[..., Any]) -> None:
        """Let `run` call `entry(function, ...)`: an engine that wraps this module puts itself in between."""
        object.__setattr__(self, "_entry", entry)

    def forward(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`function(self, ...)`, inside a forward of this module: where weights are split, they are whole in there."""
        return function(self, *args, **kwargs)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`function(self, ...)` by way of whatever runs this model."""
        return self._entry(function, *args, **kwargs)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, T) ids and mask -> (B, T, d) last hidden states. `noise` (B, T, d) is added to the embeddings."""
        # Padding may carry any id; an id outside the vocabulary would crash the embedding.
        mask = attention_mask.long()
        virtual = active_virtual_tokens(self.model)
        if virtual is not None:
            return virtual.hidden(self.model.base_model, input_ids, mask)
        if self.layout != "padded" and saves_tokens(mask, self.layout):
            return packed_hidden(self._backbone, input_ids, mask, self.layout, noise)
        return self._backbone(
            input_ids=input_ids * mask, attention_mask=mask, position_ids=positions(mask), use_cache=False, noise=noise
        ).last_hidden_state

    def _backbone(self, *, input_ids: Tensor, noise: Tensor | None = None, **places: Any) -> Any:
        if noise is None:
            return self.model.base_model(input_ids=input_ids, **places)
        embedded = self.model.get_input_embeddings()(input_ids)
        return self.model.base_model(inputs_embeds=embedded + noise.to(embedded), **places)

    def head(self, hidden: Tensor) -> Tensor:
        """(..., d) -> (..., V), or (..., 1) for a scalar model."""
        head = self._head
        if type(head) is nn.Linear:
            # Not through the module, whose own hooks would gather a split weight anew for every chunk of positions.
            return nn.functional.linear(hidden, head.weight, head.bias)
        result: Tensor = head(hidden)
        return result

    @property
    def head_weight(self) -> nn.Parameter:
        """The matrix of `head`, the embedding's own where they are tied."""
        weight = self._head.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def choose_attention(attention: str, *, dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
    """The attention implementation that will run, and why. `auto` prefers flash-attn where it can run.

    Raises:
        ValueError: flash-attn is asked for by name where it cannot run.
    """
    obstacle = None
    if device.type != "cuda":
        obstacle = f"flash-attn needs a GPU, this is {device.type}"
    elif dtype == torch.float32:
        obstacle = "flash-attn needs bfloat16 or float16"
    elif importlib.util.find_spec("flash_attn") is None:
        obstacle = "flash-attn is not installed"
    if attention == "auto":
        return ("flash_attention_2", "flash-attn is installed") if obstacle is None else ("sdpa", obstacle)
    if attention == "flash_attention_2" and obstacle is not None:
        raise ValueError(
            f"model.attention: got flash_attention_2 ({obstacle}), expected auto, sdpa or eager there; "
            "set it to auto, which takes flash-attn where it can run"
        )
    return attention, "as configured"


def num_positions(config: Any) -> int | None:
    """Tokens of the longest sequence that a model was built for; None where its config sets no limit."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def load_causal_lm(
    path: str,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "auto",
    layout: BatchLayout = "padded",
    revision: str | None = None,
    device: torch.device | str = "cpu",
    quantization: Quantization = "none",
) -> HfModel:
    """A causal language model from a Hugging Face folder or hub name, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    device = torch.device(device)
    implementation, _ = choose_attention(attention, dtype=dtype, device=device)
    model: Any = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        attn_implementation=implementation,
        revision=revision,
        **loading_arguments(quantization, dtype=dtype, device=device),
    )
    keep_precision(model)
    _refuse_transformed_logits(model, path)
    model.to(device).eval()
    return HfModel(model, model.get_output_embeddings(), choose_layout(layout, model, path))


def _refuse_transformed_logits(model: Any, path: str) -> None:
    """`head(hidden)` must be the model's logits; compare on a few tokens, whatever the architecture's name says."""
    ids = torch.arange(4, device=model.device).unsqueeze(0) % model.config.vocab_size
    with torch.no_grad():
        split = model.get_output_embeddings()(model.base_model(input_ids=ids).last_hidden_state).float()
        whole = model(input_ids=ids).logits.float()
    if not torch.allclose(split, whole, rtol=1e-2, atol=1e-2):
        raise ValueError(
            f"model.path: got {path!r}, whose logits are not its head applied to its hidden states (soft-capped or "
            "scaled logits), expected a Llama-, Qwen-, Mistral- or GPT-2-like head; choose such a model"
        )


def load_scalar_model(
    path: str,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "auto",
    layout: BatchLayout = "padded",
    revision: str | None = None,
    device: torch.device | str = "cpu",
    head: HeadStart = "require",
    seed: int = 0,
    quantization: Quantization = "none",
) -> HfModel:
    """A backbone with a scalar head (`score`, no bias), as transformers' sequence classification stores it.

    `head`: "require" refuses a folder without a trained head; "zeros" starts one at 0 (critic: first values are 0);
    "random" draws N(0, 1 / (d + 1)) as Ziegler 2019 does for reward models.
    """
    from transformers import AutoModelForSequenceClassification

    if head == "require":
        check_scalar_head(path)
    device = torch.device(device)
    implementation, _ = choose_attention(attention, dtype=dtype, device=device)
    model, info = AutoModelForSequenceClassification.from_pretrained(
        path,
        num_labels=1,
        dtype=dtype,
        attn_implementation=implementation,
        revision=revision,
        output_loading_info=True,
        **loading_arguments(quantization, dtype=dtype, device=device),
    )
    keep_precision(model)
    missing = sorted(info["missing_keys"])
    if head == "require" and missing:
        raise ValueError(_no_head(path, f"no weights for {missing[:3]}"))
    if head != "require":
        std = 0.0 if head == "zeros" else 1 / math.sqrt(model.score.in_features + 1)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            noise = torch.randn(model.score.weight.shape, generator=generator)
            model.score.weight.copy_(noise * std)
    model.to(device).eval()
    return HfModel(model, model.score, choose_layout(layout, model, path))


def check_scalar_head(path: str) -> None:
    """Refuse a local reward-model folder whose config does not describe one scalar head; cheap, loads no weights."""
    config_file = Path(path) / "config.json"
    if not os.path.isdir(path):
        return
    if not config_file.is_file():
        raise ValueError(
            f"reward model: got {path!r} without config.json, expected a Hugging Face folder; check the path"
        )
    config = json.loads(config_file.read_text(encoding="utf-8"))
    architectures = config.get("architectures") or []
    if not any("SequenceClassification" in name for name in architectures):
        raise ValueError(_no_head(path, f"architectures {architectures}"))
    labels = len(config.get("id2label") or {}) or config.get("num_labels", 2)
    if labels != 1:
        raise ValueError(_no_head(path, f"a head with {labels} labels"))


def _no_head(path: str, got: str) -> str:
    return (
        f"reward model {path!r}: got {got}, expected a sequence-classification model with one label and a trained "
        "`score` head; train one with recipes/reward_model_medical.py"
    )


def enable_gradient_checkpointing(model: HfModel) -> None:
    """Recompute activations in the backward pass. Raises ValueError with a prefix, which it would drop.

    transformers checkpoints in train mode only; dropout is set to zero first, since a policy whose old and new
    log-probabilities see different masks has no ratio of 1.
    """
    virtual = active_virtual_tokens(model.model)
    if virtual is not None and virtual.is_prefix:
        raise ValueError(
            "model.gradient_checkpointing: got true with a trained prefix, expected false: a layer that is computed "
            "again drops the cached keys and values; set it to false, or adapter.type to prompt or p_tuning"
        )
    for module in model.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if getattr(module, "attention_dropout", 0.0):
            module.attention_dropout = 0.0
    model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.model.train()


def save_model(model: HfModel, folder: Path, tokenizer: Any | None = None, *, write: bool = True) -> None:
    """Write a Hugging Face folder (safetensors, config, tokenizer) that plain transformers loads.

    `write`: False for a rank that only takes part in gathering what is split.
    """
    state = gathered_state_dict(model.model, keep=write)
    if not write:
        return
    model.model.save_pretrained(folder, state_dict=state)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


@torch.no_grad()
def load_weights(model: HfModel, folder: Path) -> None:
    """Copy the weights that `save_model` wrote back into `model`, bit for bit. Tied weights are stored once."""
    parameters = dict(model.model.named_parameters())
    saved: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        saved.update(load_file(str(file)))
    if missing := sorted(parameters.keys() - saved.keys()):
        raise ValueError(f"{folder}: got no weights for {missing[:3]}, expected all of this model's; check the folder")
    for name, parameter in parameters.items():
        assign(parameter, saved[name])

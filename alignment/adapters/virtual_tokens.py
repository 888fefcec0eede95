"""Trained tokens in front of every sequence: at the input (prompt tuning, p-tuning), or as keys and values of every
layer (prefix tuning, p-tuning v2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignment.adapters.layers import seeded, train_adapter_only
from alignment.sharding import assign, collect, gathered

PEFT_FILE = "adapter_model.safetensors"
ENCODER_FILE = "virtual_tokens.safetensors"
"""What is trained, where that is not what is used in the end."""
Kind = Literal["prompt", "p_tuning", "prefix", "p_tuning_v2"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSettings:
    """How many virtual tokens there are, and where they come from."""

    num_tokens: int = 20
    text: str | None = None
    """Where `prompt` and `p_tuning_v2` start, cut or repeated; None draws words of the vocabulary."""
    encoder: str = "mlp"
    """Of p_tuning: mlp or lstm."""
    encoder_hidden: int | None = None
    """Width of the encoder of p_tuning and prefix; None is the model's."""


class VirtualTokens(nn.Module):
    """m virtual tokens, the same in front of every row.

    Embeddings go through the whole model; prefixes are (layers, 2, heads, m, head width) keys and values that each
    layer attends to. Either way real tokens stand at positions m, m + 1, ... and padding changes nothing.
    """

    def __init__(self, encoder: nn.Module, config: Any) -> None:
        """`encoder`: peft's, from the numbers 0 .. m - 1 to what stands there; `config`: peft's as well."""
        super().__init__()
        self.encoder, self.config = encoder, config
        self.num_tokens: int = config.num_virtual_tokens
        self.is_prefix = config.peft_type == "PREFIX_TUNING"
        self.adapter_enabled = True

    def forward(self) -> Tensor:
        """(m, width) embeddings, or (m, layers * 2 * heads * head width) keys and values, as trained."""
        numbers = torch.arange(self.num_tokens, device=next(self.encoder.parameters()).device)
        tokens: Tensor = self.encoder(numbers.unsqueeze(0))[0]
        return tokens

    def hidden(self, backbone: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) ids and mask -> (B, T, d) last hidden states of the real tokens."""
        rows = len(input_ids)
        mask = nn.functional.pad(attention_mask, (self.num_tokens, 0), value=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        # Padding may carry any id; an id outside the vocabulary would crash the embedding.
        embedded = backbone.get_input_embeddings()(input_ids * attention_mask)
        common = {"attention_mask": mask, "use_cache": False}
        if self.is_prefix:
            states: Tensor = backbone(
                inputs_embeds=embedded,
                position_ids=positions[:, self.num_tokens :],
                past_key_values=self.cache(rows, embedded.dtype),
                **common,
            ).last_hidden_state
            return states
        front = self().to(embedded.dtype).expand(rows, -1, -1)
        states = backbone(
            inputs_embeds=torch.cat([front, embedded], 1), position_ids=positions, **common
        ).last_hidden_state
        return states[:, self.num_tokens :]

    def cache(self, rows: int, dtype: torch.dtype) -> Any:
        """A prefix as the cache of a forward over `rows` sequences."""
        from transformers.cache_utils import DynamicCache

        return DynamicCache([(keys, values) for keys, values in self.keys_and_values(rows, dtype)])

    def keys_and_values(self, rows: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Of each layer, (rows, heads, m, head width) both."""
        heads = self.config.num_attention_heads
        layers = self().to(dtype).view(self.num_tokens, self.config.num_layers, 2, heads, -1).permute(1, 2, 3, 0, 4)
        return [(k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1)) for k, v in layers]

    def fill(self, backbone: Any, cache: Any, rows: int) -> None:
        """Put the virtual tokens into an empty cache, for sampling."""
        dtype = backbone.get_input_embeddings().weight.dtype
        if self.is_prefix:
            for number, (keys, values) in enumerate(self.keys_and_values(rows, dtype)):
                cache.update(keys, values, number)
            return
        front = self().to(dtype).expand(rows, -1, -1)
        backbone(inputs_embeds=front, past_key_values=cache, use_cache=True)


def active_virtual_tokens(model: Any) -> VirtualTokens | None:
    """Those of a transformers model, unless they are switched off."""
    tokens: VirtualTokens | None = getattr(model, "virtual_tokens", None)
    return tokens if tokens is not None and tokens.adapter_enabled else None


def attach_virtual_tokens(
    model: Any,
    *,
    kind: Kind,
    settings: TokenSettings,
    tokenizer: Any | None,
    seed: int,
) -> None:
    """Put virtual tokens into `model.virtual_tokens`, in float32; only they (and a scalar head) stay trainable.

    Args:
        kind: `prompt` trains embeddings (Lester 2021, arXiv 2104.08691); `p_tuning` trains an MLP or LSTM that makes
            them (Liu 2021, arXiv 2103.10385); `prefix` an MLP that makes the keys and values of every layer (Li 2021,
            arXiv 2101.00190); `p_tuning_v2` trains those themselves (Liu 2022, arXiv 2110.07602).
        tokenizer: of the settings' text.

    `prompt` and `p_tuning_v2` start as words in front of the sequence: as their embeddings, or as the keys and values
    that the model makes of them (Li 2021, section 7.4). Drawn keys and values would drown the sequence's own.

    Raises:
        ValueError: a text that has no token.
    """
    width = model.config.get_text_config().hidden_size
    common = {"num_virtual_tokens": settings.num_tokens, "task_type": _task(model)}
    with seeded(model, seed):
        made, config = _MAKERS[kind](model, common, settings.encoder_hidden or width, settings.encoder)
        if kind in ("prompt", "p_tuning_v2"):
            start_from_words(model, made, _words(model, settings, tokenizer), as_prefix=kind == "p_tuning_v2")
    device = next(model.parameters()).device
    model.virtual_tokens = VirtualTokens(made.float().to(device), config)
    train_adapter_only(model)


def _task(model: Any) -> str:
    return "SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM"


def _prepared(config: Any, model: Any) -> Any:
    """Sizes as peft reads them from a model's config: of prefixes, heads are those of keys and values."""
    from peft.utils.other import _prepare_prompt_learning_config

    config.num_transformer_submodules = 1
    return _prepare_prompt_learning_config(config, model.config)


def _prompt(model: Any, common: dict[str, Any], hidden: int, encoder: str) -> tuple[nn.Module, Any]:
    from peft import PromptEmbedding, PromptTuningConfig

    config = _prepared(PromptTuningConfig(prompt_tuning_init="RANDOM", **common), model)
    made: nn.Module = PromptEmbedding(config, model.get_input_embeddings())
    return made, config


def _p_tuning(model: Any, common: dict[str, Any], hidden: int, encoder: str) -> tuple[nn.Module, Any]:
    from peft import PromptEncoder, PromptEncoderConfig

    kind = encoder.upper()
    config = PromptEncoderConfig(encoder_reparameterization_type=kind, encoder_hidden_size=hidden, **common)
    config = _prepared(config, model)
    return PromptEncoder(config), config


def _prefix(model: Any, common: dict[str, Any], hidden: int, encoder: str) -> tuple[nn.Module, Any]:
    return _prefix_encoder(model, common, projected=True, hidden=hidden)


def _p_tuning_v2(model: Any, common: dict[str, Any], hidden: int, encoder: str) -> tuple[nn.Module, Any]:
    return _prefix_encoder(model, common, projected=False, hidden=hidden)


def _prefix_encoder(model: Any, common: dict[str, Any], *, projected: bool, hidden: int) -> tuple[nn.Module, Any]:
    from peft import PrefixEncoder, PrefixTuningConfig

    config = _prepared(PrefixTuningConfig(prefix_projection=projected, **common), model)
    config.encoder_hidden_size = hidden
    return PrefixEncoder(config), config


_MAKERS: dict[str, Callable[..., tuple[nn.Module, Any]]] = {
    "prompt": _prompt,
    "p_tuning": _p_tuning,
    "prefix": _prefix,
    "p_tuning_v2": _p_tuning_v2,
}


def _words(model: Any, settings: TokenSettings, tokenizer: Any) -> Tensor:
    """(m,) ids: of the text, cut or repeated, else drawn."""
    if settings.text is None:
        return torch.randint(model.get_input_embeddings().num_embeddings, (settings.num_tokens,))
    ids = tokenizer(settings.text, add_special_tokens=False)["input_ids"] if tokenizer is not None else []
    if not ids:
        raise ValueError(
            f"adapter.virtual_tokens.text: got {settings.text!r} without a token, expected some words and the model's "
            "tokenizer; give a text, or remove it to start from drawn tokens"
        )
    return torch.tensor((ids * -(-settings.num_tokens // len(ids)))[: settings.num_tokens])


@torch.no_grad()
def start_from_words(model: Any, made: Any, ids: Tensor, *, as_prefix: bool) -> None:
    """Let `made`, peft's for `prompt` or `p_tuning_v2`, do what words of these ids (m,) in front would do."""
    from transformers.cache_utils import DynamicCache

    words = model.get_input_embeddings()
    ids = ids.to(words.weight.device)
    if not as_prefix:
        made.embedding.weight.copy_(words(ids))
        return
    # Not the model's own kind of cache, which may keep a window of the last ones only.
    cache = DynamicCache()
    layers = model.base_model(input_ids=ids.unsqueeze(0), past_key_values=cache, use_cache=True).past_key_values.layers
    # (layers * 2, heads, m, head width); all numbers of a virtual token stand in one row.
    both = torch.stack([tensor[0] for layer in layers for tensor in (layer.keys, layer.values)])
    made.embedding.weight.copy_(both.permute(2, 0, 1, 3).flatten(1))


@torch.no_grad()
def save_virtual_tokens(model: Any, folder: Path, *, base: str, write: bool = True) -> None:
    """Write what the encoder makes in peft's format, and all that is trained, to go on with, in `ENCODER_FILE`."""
    trained = collect([(name, p) for name, p in model.named_parameters() if p.requires_grad], keep=write)
    if not write:
        return
    tokens: VirtualTokens = model.virtual_tokens
    folder.mkdir(parents=True, exist_ok=True)
    config = tokens.config
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(str(folder))
    config.inference_mode = False
    values = torch.func.functional_call(tokens, {k.removeprefix("virtual_tokens."): v for k, v in trained.items()})
    tensors = {"prompt_embeddings": values.detach().cpu().contiguous()}
    if "score.weight" in trained:
        tensors["base_model.model.score.weight"] = trained["score.weight"].contiguous()
    save_file(tensors, str(folder / PEFT_FILE), metadata={"format": "pt"})
    save_file({name: tensor.contiguous() for name, tensor in trained.items()}, str(folder / ENCODER_FILE))


@torch.no_grad()
def load_virtual_tokens(model: Any, folder: Path) -> None:
    """Copy all that is trained back, bit for bit. A missing or unknown name, or another size, is an error."""
    saved = load_file(str(folder / ENCODER_FILE))
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if own.keys() != saved.keys() or any(gathered(p).shape != saved[name].shape for name, p in own.items()):
        raise ValueError(
            f"{folder}: got {len(saved)} adapter tensors, expected {len(own)} of this model's sizes; resume with the "
            "adapter settings of the saved run"
        )
    for name, parameter in own.items():
        assign(parameter, saved[name])

"""What the planner knows of a model: its matrices by size. Read from a config without weights, or described."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Matrix:
    """A linear layer."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs

    @property
    def size(self) -> int:
        return self.weights + self.outputs * self.bias

    def adapter(self, r: int) -> int:
        """Weights of a LoRA pair (Hu 2021): A is (r, inputs), B is (outputs, r)."""
        return r * (self.inputs + self.outputs)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """A decoder, in numbers of weights."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    """The head is the embedding."""
    matrices: tuple[Matrix, ...]
    """Linear layers of one decoder layer."""
    vectors: int
    """Other weights of one decoder layer: its norms."""
    outside: int
    """Weights outside the layers beside embedding and head: the last norm, learned positions."""

    @property
    def layer(self) -> int:
        """Weights of one decoder layer."""
        return self.vectors + sum(matrix.size for matrix in self.matrices)

    @property
    def embedding(self) -> int:
        return self.vocab * self.hidden

    @property
    def backbone(self) -> int:
        """Weights that multiply every token: the layers, without embedding and head."""
        return self.layers * self.layer + self.outside

    def num_parameters(self, *, scalar_head: bool = False) -> int:
        """A language model's, or those of the same backbone with a head of one number."""
        head = self.hidden if scalar_head else 0 if self.tied else self.embedding
        return self.embedding + self.backbone + head

    def adapter_parameters(self, r: int, target_modules: tuple[str, ...] | str, last_layers: int | None) -> int:
        """Weights of the LoRA pairs that `alignment.adapters.attach_lora` attaches."""
        targets = self.targets(target_modules)
        return self.adapted_layers(last_layers) * sum(matrix.adapter(r) for matrix in targets)

    def adapted_layers(self, last_layers: int | None) -> int:
        return self.layers if last_layers is None else min(last_layers, self.layers)

    def targets(self, target_modules: tuple[str, ...] | str) -> tuple[Matrix, ...]:
        """The matrices of a layer that get an adapter."""
        if target_modules == "all-linear":
            return self.matrices
        return tuple(matrix for matrix in self.matrices if matrix.name in target_modules)


def llama_shape(
    *,
    hidden: int,
    layers: int,
    heads: int,
    intermediate: int,
    vocab: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    tied: bool = False,
    qkv_bias: bool = False,
) -> ModelShape:
    """A decoder of the Llama family: RMS norms, grouped-query attention, a gated feed-forward layer."""
    kv_heads, head_dim = kv_heads or heads, head_dim or hidden // heads
    query, keys = heads * head_dim, kv_heads * head_dim
    return ModelShape(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=intermediate,
        vocab=vocab,
        tied=tied,
        matrices=(
            Matrix("q_proj", hidden, query, qkv_bias),
            Matrix("k_proj", hidden, keys, qkv_bias),
            Matrix("v_proj", hidden, keys, qkv_bias),
            Matrix("o_proj", query, hidden),
            Matrix("gate_proj", hidden, intermediate),
            Matrix("up_proj", hidden, intermediate),
            Matrix("down_proj", intermediate, hidden),
        ),
        vectors=2 * hidden,
        outside=hidden,
    )


SHAPES = {
    "smollm2-135m": llama_shape(hidden=576, layers=30, heads=9, kv_heads=3, intermediate=1536, vocab=49152, tied=True),
    "qwen2.5-0.5b": llama_shape(
        hidden=896, layers=24, heads=14, kv_heads=2, intermediate=4864, vocab=151936, tied=True, qkv_bias=True
    ),
    "qwen2.5-7b": llama_shape(
        hidden=3584, layers=28, heads=28, kv_heads=4, intermediate=18944, vocab=152064, qkv_bias=True
    ),
    "llama-7b": llama_shape(hidden=4096, layers=32, heads=32, intermediate=11008, vocab=32000),
    "llama-3-8b": llama_shape(hidden=4096, layers=32, heads=32, kv_heads=8, intermediate=14336, vocab=128256),
    "llama-70b": llama_shape(hidden=8192, layers=80, heads=64, kv_heads=8, intermediate=28672, vocab=128256),
}
"""By name, for who plans without the weights: from the config.json of HuggingFaceTB/SmolLM2-135M-Instruct,
Qwen/Qwen2.5-0.5B and -7B, meta-llama/Llama-2-7b-hf, Meta-Llama-3-8B and Meta-Llama-3-70B."""


def named_shape(name: str) -> ModelShape:
    """One of `SHAPES`.

    Raises:
        ValueError: no shape has this name.
    """
    if name not in SHAPES:
        raise ValueError(f"--shape: got {name!r}, expected one of {', '.join(SHAPES)}; or name a folder with --config")
    return SHAPES[name]


def read_shape(path: str, revision: str | None = None) -> ModelShape:
    """The shape of a model folder or hub model, from its config.json; reads no weight.

    Other families than Llama's have their own matrices counted and are otherwise taken for Llamas.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path, revision=revision))
    return shape_of(model)


def shape_of(model: Any) -> ModelShape:
    """The shape of a transformers language model, on whatever device."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    text = model.config.get_text_config()
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    matrices = []
    for name, module in layers[0].named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            rows, columns = module.weight.shape
            inputs, outputs = (rows, columns) if isinstance(module, Conv1D) else (columns, rows)
            matrices.append(Matrix(name.rsplit(".", 1)[-1], inputs, outputs, module.bias is not None))
    hidden, vocab, heads = text.hidden_size, text.vocab_size, text.num_attention_heads
    shape = ModelShape(
        hidden=hidden,
        layers=len(layers),
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or hidden // heads,
        intermediate=getattr(text, "intermediate_size", None) or 4 * hidden,
        vocab=vocab,
        tied=bool(text.tie_word_embeddings),
        matrices=tuple(matrices),
        vectors=sum(p.numel() for p in layers[0].parameters()) - sum(matrix.size for matrix in matrices),
        outside=0,
    )
    return replace(shape, outside=sum(p.numel() for p in model.parameters()) - shape.num_parameters())

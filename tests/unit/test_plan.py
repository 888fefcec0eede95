"""The planner's numbers: golden by hand, and against real models and what autograd keeps."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_config
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from actors.loading import attach_adapter
from alignment import logprobs
from alignment.adapters import attach_lora
from alignment.batching import micro_batches
from alignment.config import AdapterConfig, RoleConfig
from alignment.models import HfModel, enable_gradient_checkpointing
from alignment.packing import MicroBatchLimit, computed_tokens
from alignment.planning import activations, memory
from alignment.planning.memory import (
    MicroBatch,
    RoleMemory,
    Training,
    largest_micro_batch,
    split_states,
    weight_bytes,
)
from alignment.planning.processes import training_of
from alignment.planning.shape import SHAPES, llama_shape, read_shape, shape_of

TINY = llama_shape(hidden=8, layers=2, heads=2, kv_heads=1, intermediate=16, vocab=10, tied=True)
# One layer: q 8x8, k and v 8x4 each, o 8x8, gate, up, down 8x16 each, norms 2x8.
TINY_LAYER = 64 + 32 + 32 + 64 + 3 * 128 + 16
TINY_WEIGHTS = 2 * TINY_LAYER + 80 + 8
ROOT = Path(__file__).resolve().parents[2]


def test_weights_of_a_tiny_shape_by_hand():
    assert TINY.layer == TINY_LAYER == 592
    assert TINY.num_parameters() == TINY_WEIGHTS == 1272
    assert TINY.num_parameters(scalar_head=True) == TINY_WEIGHTS + 8
    assert llama_shape(hidden=8, layers=2, heads=2, kv_heads=1, intermediate=16, vocab=10).num_parameters() == 1352


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gpt2"])
def test_counts_are_those_of_the_real_model(kind):
    config = tiny_config(kind, 259)
    model = AutoModelForCausalLM.from_config(config)
    shape = shape_of(model)
    assert shape.num_parameters() == sum(p.numel() for p in model.parameters())
    config.num_labels = 1
    scalar = AutoModelForSequenceClassification.from_config(config)
    assert shape.num_parameters(scalar_head=True) == sum(p.numel() for p in scalar.parameters())


def test_a_described_shape_is_the_one_that_a_config_gives():
    config = tiny_config("qwen2", 259)
    described = llama_shape(hidden=32, layers=2, heads=4, kv_heads=2, intermediate=64, vocab=259, qkv_bias=True)
    assert shape_of(AutoModelForCausalLM.from_config(config)) == described


@pytest.mark.parametrize(("name", "billions"), [("llama-7b", 6.738415616), ("llama-70b", 70.553706496)])
def test_published_sizes(name, billions):
    assert SHAPES[name].num_parameters() == billions * 1e9


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("last_layers", [None, 1, 5])
def test_adapter_weights_are_those_that_are_attached(kind, last_layers):
    model = AutoModelForCausalLM.from_config(tiny_config(kind, 259))
    expected = shape_of(model).adapter_parameters(4, "all-linear", last_layers)
    attach_lora(model, r=4, alpha=8, last_layers=last_layers)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected > 0


def test_adapter_weights_of_named_matrices_by_hand():
    """q: 4 (8 + 8), v: 4 (8 + 4), in 2 layers."""
    assert TINY.adapter_parameters(4, ("q_proj", "v_proj"), None) == 2 * (64 + 48)


@pytest.mark.parametrize(
    ("dtype", "weights", "masters"),
    [("float32", 4 * TINY_WEIGHTS, 0), ("bfloat16", 2 * TINY_WEIGHTS, 4 * TINY_WEIGHTS)],
)
def test_states_of_full_training_by_hand(dtype, weights, masters):
    found = split_states(TINY, Training(), TINY_WEIGHTS, dtype=dtype, scalar_head=False)
    assert found == RoleMemory(weights=weights, masters=masters, moments=8 * TINY_WEIGHTS, gradients=4 * TINY_WEIGHTS)


WHOLE_AT_ONCE = TINY_LAYER + 80 + 8  # a layer, the embedding and the last norm


@pytest.mark.parametrize(
    ("engine", "stage", "dtype", "expected"),
    [
        # weights, gathered, masters, moments, gradients of 1272 weights on 4 ranks
        ("torch", 0, "bfloat16", (2544, 0, 5088, 10176, 5088)),
        ("torch", 2, "bfloat16", (636, 2544, 1272, 2544, 1272)),
        ("torch", 3, "bfloat16", (636, 2 * WHOLE_AT_ONCE, 1272, 2544, 1272)),
        ("torch", 3, "float32", (1272, 4 * WHOLE_AT_ONCE, 0, 2544, 1272)),
        ("deepspeed", 0, "float32", (5088, 0, 0, 10176, 5088)),
        ("deepspeed", 1, "float32", (5088, 0, 1272, 2544, 5088)),
        ("deepspeed", 2, "bfloat16", (2544, 0, 1272, 2544, 1272)),
        ("deepspeed", 3, "bfloat16", (636, 2544, 1272, 2544, 1272)),
    ],
)
def test_each_engine_and_stage_divides_what_it_divides(engine, stage, dtype, expected):
    training = Training(ranks=4, engine=engine, zero_stage=stage)
    found = split_states(TINY, training, TINY_WEIGHTS, dtype=dtype, scalar_head=False)
    assert (found.weights, found.gathered, found.masters, found.moments, found.gradients) == expected


def test_deepspeed_leaves_a_bounded_number_of_weights_gathered():
    shape = SHAPES["llama-7b"]
    training = Training(ranks=8, engine="deepspeed", zero_stage=3)
    found = split_states(shape, training, shape.num_parameters(), dtype="bfloat16", scalar_head=False)
    assert (found.gathered, found.weights) == (2e9, 6738415616 * 2 / 8)


def test_one_rank_of_torch_splits_nothing():
    alone = split_states(TINY, Training(zero_stage=3), TINY_WEIGHTS, dtype="float32", scalar_head=False)
    assert alone == split_states(TINY, Training(), TINY_WEIGHTS, dtype="float32", scalar_head=False)


@pytest.mark.parametrize(("offload", "host"), [("none", 0), ("optimizer", 16 * 318), ("all", 18 * 318)])
def test_what_is_offloaded_moves_to_the_host(offload, host):
    """18 bytes of each of 1272 / 4 weights: 2 of weight, 4 of master, 8 of moments, 4 of gradient."""
    training = Training(ranks=4, engine="deepspeed", zero_stage=3, offload=offload)
    found = split_states(TINY, training, TINY_WEIGHTS, dtype="bfloat16", scalar_head=False, on_gpu=True)
    here = (found.weights, found.masters, found.moments, found.gradients)
    assert (found.host, sum(here)) == (host, 18 * 318 - host)
    assert found.gathered == 2 * TINY_WEIGHTS
    on_cpu = split_states(TINY, training, TINY_WEIGHTS, dtype="bfloat16", scalar_head=False)
    assert (on_cpu.host, on_cpu.held + on_cpu.gradients) == (0, 18 * 318)


def test_a_model_that_does_not_learn_is_split_by_its_workers():
    micro = MicroBatch(rows=1, longest=4, answer=2)
    one, four = (memory.scorer_memory(TINY, micro, dtype="float32", scalar_head=True, parts=n) for n in (1, 4))
    assert (one.weights, one.gathered) == (4 * 1280, 0)
    assert (four.weights, four.gathered) == (1280, 4 * (1280 - TINY_LAYER))
    assert four.activations == one.activations


@pytest.mark.parametrize(
    ("limit", "sequences", "rows"),
    [
        ({"rows": 4}, 1, 4),
        ({"rows": 64}, 1, 16),
        ({"tokens": 350}, 1, 3.5),
        ({"tokens": 350, "rows": 2}, 1, 2),
        ({"tokens": 90}, 1, 1),
        ({"tokens": 1_000_000}, 1, 16),
        ({"rows": 4}, 2, 8),
        ({"tokens": 350}, 2, 3.5),
        ({"tokens": 350, "rows": 1}, 2, 2),
        ({"tokens": 90}, 2, 2),
    ],
)
def test_the_largest_micro_batch(limit, sequences, rows):
    """Of 16 rows of 100 tokens, each one sequence or a pair of them."""
    limit = MicroBatchLimit(**limit)
    micro = largest_micro_batch(limit, available=16, longest=100, answer=10, sequences=sequences)
    assert (micro.rows, micro.tokens) == (rows, 100 * rows)


def test_no_micro_batch_computes_more_than_the_largest():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 101, (40, 1), generator=generator)
    for settings in ({"rows": 3}, {"tokens": 350}, {"tokens": 350, "rows": 5}):
        for layout in ("padded", "packed", "one_row"):
            limit = MicroBatchLimit(**settings, layout=layout)
            most = largest_micro_batch(limit, available=40, longest=100, answer=10).tokens
            batches = micro_batches(torch.arange(40), lengths, limit)
            computed = [computed_tokens(lengths[batch, 0].tolist(), layout) for batch in batches]
            assert 0.6 * most < max(computed) <= most


def test_four_bits_are_for_the_matrices_of_the_layers():
    quantized = 2 * (TINY_LAYER - 16)
    expected = quantized * (0.5 + 1 / 64 + 1 / 4096) + 4 * (TINY_WEIGHTS - quantized)
    assert weight_bytes(TINY, dtype="float32", quantization="nf4") == expected
    assert memory.file_pages(TINY, Training(r=1, quantization="nf4"), width=4) == 4 * quantized
    assert memory.file_pages(TINY, Training(r=1), width=4) == 0


def test_cache_by_hand():
    """2 (keys, values) x 2 layers x 1 head x 4 numbers x 4 bytes x 3 rows x 5 tokens."""
    assert memory.cache_bytes(TINY, sequences=3, longest=5, width=4) == 2 * 2 * 4 * 4 * 3 * 5


def test_the_chunk_of_logits_is_the_learners():
    assert memory.CHUNK_SIZE == logprobs.CHUNK_SIZE
    found = activations.logits_bytes(
        TINY, positions=1000, width=2, chunk=512, scaled=True, entropy=False, training=True
    )
    assert found == 512 * 10 * (2 + 4 + 4 + 4)


def saved(model: HfModel, ids: torch.Tensor, mask: torch.Tensor) -> int:
    """Bytes that autograd keeps of a forward pass, every storage once, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.hidden(ids, mask)
    assert hidden.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(
    "adapter",
    [
        {},
        {"r": 8},
        {"r": 8, "last_layers": 2},
        {"r": 8, "target_modules": ("q_proj", "v_proj")},
        {"r": 8, "target_modules": ("k_proj", "down_proj")},
    ],
    ids=str,
)
def test_activations_are_what_autograd_keeps(dtype, padded, adapter):
    config = tiny_config("llama", 259, hidden_size=64, intermediate_size=96, num_hidden_layers=4)
    causal = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).eval()
    shape = shape_of(causal)
    if adapter:
        attach_lora(causal, alpha=8, **adapter)
    rows, longest = 3, 40
    ids, mask = torch.randint(0, 259, (rows, longest)), torch.ones(rows, longest, dtype=torch.bool)
    mask[0, -5:] = not padded
    found = saved(HfModel(causal, causal.get_output_embeddings()), ids, mask)
    width = memory.WIDTHS[dtype]
    expected = activations.saved_bytes(shape, rows=rows, longest=longest, width=width, padded=padded, **adapter)
    assert expected == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("adapter", [{}, {"r": 8}], ids=str)
def test_packed_rows_keep_what_their_computed_tokens_do(adapter):
    """Four sequences that take two rows of 40."""
    config = tiny_config("llama", 259, hidden_size=64, intermediate_size=96, num_hidden_layers=4)
    causal = AutoModelForCausalLM.from_config(config).eval()
    shape = shape_of(causal)
    if adapter:
        attach_lora(causal, alpha=8, **adapter)
    ids, mask = torch.randint(0, 259, (4, 40)), torch.ones(4, 40, dtype=torch.bool)
    for row, length in enumerate((40, 20, 12, 8)):
        mask[row, length:] = False
    found = {
        layout: saved(HfModel(causal, causal.get_output_embeddings(), layout), ids, mask)
        for layout in ("padded", "packed")
    }
    for layout, rows in (("padded", 4), ("packed", 2)):
        expected = activations.saved_bytes(shape, rows=rows, longest=40, width=4, **adapter)
        assert expected == pytest.approx(found[layout], rel=0.03)


@pytest.mark.parametrize("adapter", [{}, {"r": 8}], ids=str)
def test_checkpointing_keeps_the_inputs_of_layers(adapter):
    config = tiny_config("llama", 259, hidden_size=64, intermediate_size=96, num_hidden_layers=4)
    causal = AutoModelForCausalLM.from_config(config).eval()
    shape = shape_of(causal)
    if adapter:
        attach_lora(causal, alpha=8, **adapter)
    model = HfModel(causal, causal.get_output_embeddings())
    enable_gradient_checkpointing(model)
    ids, mask = torch.randint(0, 259, (3, 40)), torch.ones(3, 40, dtype=torch.bool)
    mask[0, -5:] = False
    size = {"rows": 3, "longest": 40, "width": 4}
    expected = activations.saved_bytes(shape, checkpointing=True, **size, **adapter)
    targets = shape.matrices if adapter else ()
    again = 120 * activations.layer_bytes(shape, width=4, longest=40, r=adapter.get("r", 0), targets=targets)
    # Sine and cosine live beside what is saved.
    shared = 120 * 2 * shape.head_dim * 4
    assert expected - again - shared == pytest.approx(saved(model, ids, mask), rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["policy, full, 2 x 160", "policy, LoRA on 10 layers, 4 x 160"])
def test_memory_is_within_15_percent_of_what_a_real_learner_takes(name):
    from alignment.data.model_assets import resolve_model

    sys.path.insert(0, str(ROOT))
    from benchmarks.planner import CASES, predicted_mb, run_case

    path = resolve_model("asset:smollm2-135m-instruct")
    found = run_case(name, path)["peak_mb"]
    assert predicted_mb(CASES[name], read_shape(path)) == pytest.approx(found, rel=0.15)


@pytest.mark.parametrize(
    "adapter",
    [
        {"type": "rslora", "r": 4},
        {"type": "dora", "r": 4, "last_layers": 1},
        {"type": "pissa", "r": 4, "target_modules": ("q_proj", "down_proj")},
        {"type": "adalora", "r": 4, "budget": {"target_r": 2}},
        {"type": "ia3"},
        {"type": "bottleneck", "r": 4, "last_layers": 2},
        {"type": "prompt"},
        {"type": "p_tuning", "virtual_tokens": {"encoder_hidden": 8}},
        {"type": "p_tuning", "virtual_tokens": {"encoder_hidden": 8, "encoder": "lstm"}},
        {"type": "prefix", "virtual_tokens": {"num_tokens": 3}},
        {"type": "p_tuning_v2"},
        {"type": "half"},
    ],
    ids=str,
)
def test_every_method_trains_as_many_weights_as_is_planned(adapter):
    config = AdapterConfig(**adapter)
    causal = AutoModelForCausalLM.from_config(tiny_config("llama", 259, num_hidden_layers=3))
    model = HfModel(causal, causal.get_output_embeddings())
    shape = shape_of(causal)
    attach_adapter(model, config, total_updates=10, seed=0)
    found = sum(p.numel() for p in model.parameters() if p.requires_grad)
    training = training_of(shape, config, RoleConfig(), checkpointing=False, micro_batches=1)
    assert memory.trained_parameters(shape, training, scalar_head=False) == found

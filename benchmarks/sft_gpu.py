"""QLoRA and LoRA steps of a large shape on one GPU: `python benchmarks/sft_gpu.py --shape llama-7b`.

Random weights of a named shape (python -m alignment.plan lists them), bfloat16, packed rows, the attention that
`auto` takes. Prints tokens per second, the share of the given peak rate of matrix products, and peak memory.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from alignment import adapters, models
from alignment.engines.torch import TorchEngine
from alignment.learners.sft import SftLearner
from alignment.packing import MicroBatchLimit
from alignment.planning.shape import SHAPES, named_shape
from alignment.types import SftExample

WARM_UP_STEPS = 2


def write_model(folder: Path, shape: str, device: str) -> None:
    """A Llama of that shape with random weights, in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    wanted = named_shape(shape)
    config = LlamaConfig(
        vocab_size=wanted.vocab,
        hidden_size=wanted.hidden,
        intermediate_size=wanted.intermediate,
        num_hidden_layers=wanted.layers,
        num_attention_heads=wanted.heads,
        num_key_value_heads=wanted.kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=wanted.tied,
        dtype="bfloat16",
    )
    with torch.device(device):
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def examples_of(count: int, seed: int, longest: int) -> list[SftExample]:
    generator = torch.Generator().manual_seed(seed)
    lengths = (longest * torch.rand(count, generator=generator)).int().clamp(min=32).tolist()
    return [
        SftExample(
            id=f"{seed}/{i}",
            input_ids=tuple(torch.randint(5, 30_000, (n,), generator=generator).tolist()),
            response_mask=tuple(t >= n // 3 for t in range(n)),
        )
        for i, n in enumerate(lengths)
    ]


def measure(folder: str, quantization: str, args: argparse.Namespace) -> dict[str, Any]:
    model = models.load_causal_lm(
        folder,
        dtype=torch.bfloat16,
        device=args.device,
        layout="auto",
        quantization=quantization,  # type: ignore[arg-type]
    )
    adapters.attach_lora(model.model, r=16, alpha=32)
    if args.gradient_checkpointing:
        models.enable_gradient_checkpointing(model)
    engine = TorchEngine(model.named_parameters(), lr=1e-4, total_updates=args.steps + WARM_UP_STEPS)
    limit = MicroBatchLimit(tokens=args.tokens, layout=model.layout)
    learner = SftLearner(model, engine, micro_batch_limit=limit, device=args.device)
    on_gpu = args.device == "cuda"
    seconds, tokens = 0.0, 0.0
    for step in range(args.steps + WARM_UP_STEPS):
        if step == WARM_UP_STEPS and on_gpu:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        metrics = learner.update(examples_of(args.batch_size, step, args.longest), step=step)
        if on_gpu:
            torch.cuda.synchronize()
        if step >= WARM_UP_STEPS:
            seconds, tokens = seconds + time.perf_counter() - began, tokens + metrics["sft/tokens"]
    memory = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    return {"tokens/s": tokens / seconds, "GiB": memory, "attention": model.model.config._attn_implementation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--longest", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=8192, help="of a micro-batch")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--peak-tflops", type=float, help="of matrix products, for the share of it that is reached")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), args.shape, args.device)
        parameters = named_shape(args.shape).num_parameters()
        for quantization in ("nf4", "none"):
            found = measure(folder, quantization, args)
            # Forward 2 operations a weight and token; backward 2 for activations: frozen weights have no gradient.
            tflops = 4 * parameters * found["tokens/s"] / 1e12
            share = f", {tflops / args.peak_tflops:.0%} of peak" if args.peak_tflops else ""
            print(
                f"{args.shape} {quantization}: {found['tokens/s']:.0f} tokens/s, {tflops:.1f} TFLOP/s{share}, "
                f"{found['GiB']:.1f} GiB, attention {found['attention']}",
                flush=True,
            )


if __name__ == "__main__":
    main()

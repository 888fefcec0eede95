"""Micro-batches by rows, by a token budget, and packed: `python benchmarks/packing.py`.

Sixteen sequences of SmolLM2-135M in float32, of mixed lengths: the policy's forward and backward pass over all of
them, cut and laid out in each way. The ways take turns, and the fastest block of each counts: what else a machine does
only adds. Seconds are those on the clock and those of the processor, which a busy machine stretches less. Tokens are
those that the forwards compute; the largest micro-batch is what decides the memory.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from alignment.batching import micro_batches, sequence_batch
from alignment.data.model_assets import resolve_model
from alignment.forward import response_logprobs
from alignment.models import HfModel, load_causal_lm
from alignment.packing import MicroBatchLimit, computed_tokens


def sequences(count: int, shortest: int, longest: int) -> list[list[int]]:
    """Ids whose lengths are spread evenly over the range, in random order."""
    draw = random.Random(0)
    lengths = [shortest + round(i * (longest - shortest) / max(count - 1, 1)) for i in range(count)]
    draw.shuffle(lengths)
    return [[draw.randrange(1000, 40_000) for _ in range(length)] for length in lengths]


def ways(rows: int, tokens: int) -> dict[str, MicroBatchLimit]:
    return {
        f"{rows} rows, padded": MicroBatchLimit(rows=rows),
        f"{tokens} tokens, padded": MicroBatchLimit(tokens=tokens),
        f"{tokens} tokens, packed": MicroBatchLimit(tokens=tokens, layout="packed"),
    }


def one_pass(model: HfModel, work: list[list[int]], parts: list[Tensor]) -> tuple[float, float]:
    """Forward and backward over every micro-batch; returns seconds of the clock and of the processor.

    Half of each sequence is its response.
    """
    began = time.perf_counter(), time.process_time()
    for part in parts:
        ids, mask = sequence_batch([work[i] for i in part.tolist()], model.device)
        response = mask & (torch.arange(ids.shape[1], device=ids.device) >= mask.sum(1, keepdim=True) // 2)
        logprobs, _ = response_logprobs(model, ids, mask, response, temperature=1.0)
        logprobs.sum().backward()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began[0], time.process_time() - began[1]


def measure(model: HfModel, work: list[list[int]], limits: dict[str, MicroBatchLimit], repetitions: int) -> list[dict]:
    lengths = torch.tensor([len(row) for row in work])
    cuts = {name: micro_batches(torch.arange(len(work)), lengths, limit) for name, limit in limits.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in limits}
    gradient: dict[str, float] = {}
    for repetition in range(repetitions + 1):
        for name, limit in limits.items():
            model.layout = limit.layout
            model.zero_grad(set_to_none=False)
            took = one_pass(model, work, cuts[name])
            gradient[name] = float(
                torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
            )
            if repetition:  # the first block of each warms up
                seconds[name].append(took)
    best = {name: [min(kind) for kind in zip(*blocks, strict=True)] for name, blocks in seconds.items()}
    first = next(iter(limits))
    return [
        {
            "way": name,
            "micro_batches": len(cuts[name]),
            "tokens": sum(computed_tokens(lengths[part].tolist(), limit.layout) for part in cuts[name]),
            "largest": max(computed_tokens(lengths[part].tolist(), limit.layout) for part in cuts[name]),
            "seconds": round(best[name][0], 2),
            "speed": round(best[first][0] / best[name][0], 2),
            "processor_seconds": round(best[name][1], 2),
            "processor_speed": round(best[first][1] / best[name][1], 2),
            "gradient_norm": round(gradient[name], 4),
        }
        for name, limit in limits.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="asset:smollm2-135m-instruct")
    parser.add_argument("--count", type=int, default=16, help="sequences")
    parser.add_argument("--shortest", type=int, default=40, help="tokens")
    parser.add_argument("--longest", type=int, default=400, help="tokens")
    parser.add_argument("--rows", type=int, default=4, help="of a micro-batch that is cut by rows")
    parser.add_argument("--tokens", type=int, default=2048, help="of a micro-batch that is cut by tokens")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_causal_lm(resolve_model(args.model), dtype=getattr(torch, args.dtype), device=device)
    work = sequences(args.count, args.shortest, args.longest)
    print(f"{sum(map(len, work))} tokens in {len(work)} sequences, {device}, {torch.get_num_threads()} threads")
    for row in measure(model, work, ways(args.rows, args.tokens), args.repetitions):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

"""Supervised steps on two cores, next to a rival's on the same rows in the same run: `python benchmarks/sft_step.py`.

The work: full fp32 fine-tuning of SmolLM2-135M on real instructions, batch 8, lengths drawn from a lognormal
distribution (median 55, at most 220 tokens), the answer's tokens trained, AdamW with a constant rate. Both systems
see the same ids in the same order, and their losses are compared step by step. Prints tokens per second, peak memory
of all processes, and both ratios. The layouts in bfloat16 are apart: their losses differ by what rounding does, and a
processor without instructions for it is slower than in float32.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from alignment.config import SftDataConfig
from alignment.data.chat import eos_ids_of_model, load_tokenizer
from alignment.data.model_assets import resolve_model
from alignment.data.sft import load_sft_data
from alignment.data.sources import read_rows
from alignment.memory import MemoryMeter
from alignment.types import SftExample
from benchmarks.meter import matmul_peak

ROOT = Path(__file__).resolve().parents[1]
BATCH, MEDIAN, LONGEST, SEED = 8, 55, 220, 1
WARM_UP_STEPS = 2
RUN = """
run: {{seed: {seed}, num_steps: {steps}, checkpoint_every: 1000, trackers: []}}
data: {{sources: [{{path: {rows}, format: prompt_completion}}], held_out: 0, max_tokens: {longest}}}
model: {{path: {model}}}
training:
  batch_size: {batch}
  {micro_batch}
  optimizer: {{lr: {lr}, warmup_ratio: 0.0, decay: constant}}
"""
LAYOUTS = {
    "one process": ["--local"],
    "through Ray": [],
    "one process, in bfloat16": ["--local", "--model.dtype", "bfloat16"],
    # What the two cost apart is a matter of the processes' environment too: with one malloc arena the threads of
    # bfloat16 products wait for each other.
    "through Ray, in bfloat16": ["--model.dtype", "bfloat16"],
}


def write_rows(path: Path, model: str, count: int) -> None:
    """Real instructions whose rendered lengths follow the distribution: for each drawn length, the unused row that is
    closest to it."""
    source = SftDataConfig.model_validate(
        {"sources": [{"asset": "alpaca-en-demo"}], "held_out": 0, "max_tokens": 4096}
    )
    tokenizer = load_tokenizer(model)
    ends = eos_ids_of_model(tokenizer, model)
    rows = read_rows(source.sources[0])
    lengths = {}
    for i, row in enumerate(rows):
        text = "\n\n".join(part for part in (row.values["instruction"], row.values.get("input")) if part)
        lengths[i] = (text, row.values["output"], _length(tokenizer, text, row.values["output"], ends))
    generator = torch.Generator().manual_seed(SEED)
    drawn = (MEDIAN * torch.exp(0.7 * torch.randn(count, generator=generator))).clamp(24, LONGEST).tolist()
    with open(path, "w", encoding="utf-8") as file:
        for wanted in drawn:
            best = min(
                (i for i in lengths if lengths[i][2] <= LONGEST), key=lambda i: (abs(lengths[i][2] - wanted), i)
            )
            prompt, completion, _ = lengths.pop(best)
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")


def _length(tokenizer: Any, prompt: str, completion: str, ends: frozenset[int]) -> int:
    from alignment.data.chat import encode_answer

    return sum(map(len, encode_answer(tokenizer, [{"role": "user", "content": prompt}], completion, eos_ids=ends)))


def batches(config: Path, model: str, steps: int) -> list[list[SftExample]]:
    """What the recipe's steps will see."""
    from alignment.config import SftRunConfig
    from alignment.config_io import load_config

    run = load_config(SftRunConfig, file=config, overrides=[])
    tokenizer = load_tokenizer(model)
    data = load_sft_data(run.data, tokenizer, eos_ids=eos_ids_of_model(tokenizer, model), seed=run.run.seed)
    return [list(data.batch(step, BATCH)) for step in range(steps)]


def run_ours(folder: Path, config: Path, layout: str) -> dict[str, Any]:
    output = folder / layout.replace(" ", "_").replace(",", "")
    command = [sys.executable, str(ROOT / "recipes" / "sft_medical.py"), "--config", str(config)]
    command += ["--output-dir", str(output), *LAYOUTS[layout]]
    with MemoryMeter() as meter:
        subprocess.run(command, check=True, stdout=sys.stderr)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {
        "system": layout,
        "seconds": [row["timing/step"] for row in rows],
        "losses": [row["sft/loss"] for row in rows],
        "peak_mb": meter.peak_mb,
    }


def run_rival(folder: Path, model: str, examples: list[list[SftExample]], args: argparse.Namespace) -> dict[str, Any]:
    rows, result = folder / "ids.jsonl", folder / "trl.json"
    with open(rows, "w", encoding="utf-8") as file:
        for example in (example for batch in examples for example in batch):
            labels = [i if m else -100 for i, m in zip(example.input_ids, example.response_mask, strict=True)]
            file.write(json.dumps({"input_ids": example.input_ids, "labels": labels}) + "\n")
    command = [sys.executable, str(ROOT / "benchmarks" / "rivals" / "trl_sft.py"), "--model", model]
    command += ["--rows", str(rows), "--json", str(result), "--learning-rate", str(args.lr)]
    command += ["--batch-size", str(BATCH)]
    command += ["--trl-path", str(args.trl_path)] if args.trl_path else []
    subprocess.run(command, check=True, stdout=sys.stderr)
    answer: dict[str, Any] = json.loads(result.read_text())
    return answer


def report(ours: list[dict[str, Any]], rival: dict[str, Any] | None, examples: list[list[SftExample]]) -> str:
    tokens = [sum(len(e.input_ids) for e in batch) for batch in examples]
    lengths = sorted(len(e.input_ids) for batch in examples for e in batch)
    peak = matmul_peak()
    lines = [
        f"{len(examples)} steps x {BATCH} rows, {sum(tokens)} tokens (median {statistics.median(lengths):.0f}, "
        f"longest {lengths[-1]}); matrix products here: {peak.model:.0f} GFLOP/s, {peak.threads} threads"
    ]

    def rate(figures: dict[str, Any]) -> float:
        return sum(tokens[WARM_UP_STEPS:]) / math.fsum(figures["seconds"][WARM_UP_STEPS:])

    for figures in [*ours, *([rival] if rival else [])]:
        step = statistics.median(figures["seconds"][WARM_UP_STEPS:])
        lines.append(
            f"{figures['system']:<24} {rate(figures):>7.1f} tokens/s, {step:.2f} s a step, peak memory "
            f"{figures['peak_mb']:.0f} MB, loss {figures['losses'][0]:.4f} -> {figures['losses'][-1]:.4f}"
        )
    for figures in ours if rival else []:
        assert rival is not None
        apart = max(abs(a - b) for a, b in zip(figures["losses"], rival["losses"], strict=True))
        lines.append(
            f"{figures['system']}: ratio of tokens/s {rate(figures) / rate(rival):.2f}x, of memory "
            f"{figures['peak_mb'] / rival['peak_mb']:.2f}; losses differ by at most {apart:.1e}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="measured steps, after two that warm up")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--micro-batch", default="max_tokens_per_micro_batch: 320", help="of the section training")
    parser.add_argument("--layout", action="append", choices=LAYOUTS, help="this one alone; default: all")
    parser.add_argument("--no-rival", action="store_true", help="ours alone")
    parser.add_argument("--trl-path", type=Path, help="folder with trl 1.16.0; default: installed once into the cache")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    steps, model = args.steps + WARM_UP_STEPS, resolve_model("asset:smollm2-135m-instruct")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows, config = folder / "rows.jsonl", folder / "run.yaml"
        write_rows(rows, model, steps * BATCH)
        settings = {"seed": SEED, "steps": steps, "rows": rows, "longest": LONGEST + 1, "model": model}
        config.write_text(RUN.format(**settings, batch=BATCH, micro_batch=args.micro_batch, lr=args.lr))
        examples = batches(config, model, steps)
        rival = None if args.no_rival else run_rival(folder, model, examples, args)
        ours = [run_ours(folder, config, layout) for layout in args.layout or LAYOUTS]
    print(report(ours, rival, examples))
    if args.json:
        args.json.write_text(json.dumps({"ours": ours, "rival": rival}, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""What `dpo_step.py` and `kto_step.py` share: rows of drawn lengths, a run of ours, a rival's on the same ids, ratios.

Memory is the peak of all processes of a run, ours with its checkpoint and export at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alignment.config.judged_data import TaskConfig
from alignment.data.chat import eos_ids_of_model, load_tokenizer
from alignment.data.dialects import canonical
from alignment.data.model_assets import resolve_model
from alignment.data.preferences import read_pair
from alignment.data.reading import Encoder, TooLong
from alignment.data.sources import read_rows
from alignment.memory import MemoryMeter
from alignment.types import PreferencePair
from benchmarks.meter import matmul_peak

ROOT = Path(__file__).resolve().parents[1]
MEDIAN, SHORTEST, LONGEST, SEED = 55, 24, 220, 1
WARM_UP_STEPS = 2
ASSETS = ("treatment-plans", "dpo-en-demo", "nq-pairs")
RUN = """
run: {{seed: {seed}, num_steps: {steps}, checkpoint_every: 1000, trackers: []}}
data: {{sources: [{{path: {rows}}}], held_out: 0, max_tokens: {longest}}}
model: {{path: {model}}}
training:
  batch_size: {batch}
  {micro_batch}
  optimizer: {{lr: {lr}, warmup_ratio: 0.0, decay: constant}}
"""
Values = dict[str, Any]
Read = Callable[[Any, Any, frozenset[int] | None], Any]
"""From the config of a run, a tokenizer and the ids that end an answer to the records of the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """One way to run ours."""

    reference: str
    flags: tuple[str, ...]


def layouts_of(section: str) -> dict[str, Layout]:
    """Ours: the reference cached and live, prompts shared and not, by the config's section that says so."""
    return {
        f"{reference}, {name}": Layout(reference=reference, flags=(f"--{section}.share_prompts", shared))
        for name, shared in (("prompts shared", "true"), ("answers apart", "false"))
        for reference in ("cached", "live")
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """A kind of step that is measured."""

    kind: str
    """dpo or kto."""
    batch: int
    micro_batch: str
    """Of the section training, what keeps memory within bounds."""
    config: type
    read: Read
    rows_of: Callable[[Values, PreferencePair], Iterator[tuple[Values, float]]]
    """Rows that one pair gives, each with its length in tokens: what is drawn."""
    rival_rows: Callable[[Sequence[Any]], Iterator[Values]]
    """The records of a batch, as the rival's ids."""
    layouts: dict[str, Layout]


def write_rows(path: Path, model: str, work: Work, count: int) -> None:
    """Real rows whose rendered lengths follow the distribution: for each drawn length, the unused row that is closest
    to it."""
    tokenizer = load_tokenizer(model)
    ends = eos_ids_of_model(tokenizer, model)
    encoder = Encoder(tokenizer=tokenizer, eos_ids=ends, max_tokens=LONGEST + 1, system_prompt=None)
    pool = [row for asset in ASSETS for values, pair in _pairs(asset, encoder) for row in work.rows_of(values, pair)]
    left = dict(enumerate(pool))
    generator = torch.Generator().manual_seed(SEED)
    drawn = (MEDIAN * torch.exp(0.7 * torch.randn(count, generator=generator))).clamp(SHORTEST, LONGEST).tolist()
    with open(path, "w", encoding="utf-8") as file:
        for wanted in drawn:
            best = min(left, key=lambda i: (abs(left[i][1] - wanted), i))
            file.write(json.dumps(left.pop(best)[0]) + "\n")


def _pairs(asset: str, encoder: Encoder) -> Iterator[tuple[Values, PreferencePair]]:
    """Rows that fit whole, as they are and as ids."""
    for row in map(canonical, read_rows(TaskConfig(asset=asset))):
        try:
            reading = read_pair(row, encoder)
        except TooLong:
            continue
        if "truncated" not in reading.told:
            yield row.values, reading.record


def batches(config: Path, model: str, work: Work, steps: int) -> list[list[Any]]:
    """What the recipe's steps will see."""
    from alignment.config_io import load_config

    run = load_config(work.config, file=config, overrides=[])
    tokenizer = load_tokenizer(model)
    tasks = work.read(run, tokenizer, eos_ids_of_model(tokenizer, model))
    return [tasks.batch(step, work.batch) for step in range(steps)]


def run_ours(folder: Path, config: Path, work: Work, name: str) -> Values:
    output, layout = folder / name.replace(" ", "_"), work.layouts[name]
    command = [sys.executable, str(ROOT / "recipes" / f"{work.kind}_medical.py"), "--config", str(config), "--local"]
    command += ["--output-dir", str(output), "--reference.mode", layout.reference, *layout.flags]
    # A cache of its own: numbers that an earlier run has left would spare this one the reference.
    with MemoryMeter() as meter:
        subprocess.run(command, check=True, stdout=sys.stderr, env=os.environ | {"RAYLIGN_CACHE": str(output / "c")})
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {
        "system": name,
        "reference": layout.reference,
        "seconds": [row["timing/step"] for row in rows],
        "losses": [row[f"{work.kind}/loss"] for row in rows],
        "peak_mb": meter.peak_mb,
    }


def run_rival(
    folder: Path, model: str, work: Work, records: Sequence[Sequence[Any]], reference: str, args: argparse.Namespace
) -> Values:
    rows, result = folder / "ids.jsonl", folder / f"trl_{reference}.json"
    with open(rows, "w", encoding="utf-8") as file:
        for batch in records:
            file.writelines(f"{json.dumps(row)}\n" for row in work.rival_rows(batch))
    command = [sys.executable, str(ROOT / "benchmarks" / "rivals" / "trl_preferences.py"), "--kind", work.kind]
    command += ["--model", model, "--rows", str(rows), "--json", str(result), "--learning-rate", str(args.lr)]
    command += ["--batch-size", str(work.batch), "--reference", reference]
    command += ["--trl-path", str(args.trl_path)] if args.trl_path else []
    subprocess.run(command, check=True, stdout=sys.stderr)
    answer: Values = json.loads(result.read_text())
    return answer | {"system": f"{answer['system']}, {reference}", "reference": reference}


def report(ours: list[Values], rivals: list[Values], records: Sequence[Sequence[Any]], work: Work) -> str:
    lengths = sorted(len(ids) for batch in records for record in batch for ids in record.sequences)
    prompts = sum(len(record.prompt_ids) * len(record.sequences) for batch in records for record in batch)
    peak = matmul_peak()
    lines = [
        f"{len(records)} steps x {work.batch} rows, {len(lengths)} sequences, {sum(lengths)} tokens (median "
        f"{statistics.median(lengths):.0f}, longest {lengths[-1]}, {prompts / sum(lengths):.0%} of them prompts); "
        f"matrix products here: {peak.model:.0f} GFLOP/s, {peak.threads} threads"
    ]

    def mean(figures: Values) -> float:
        measured = figures["seconds"][WARM_UP_STEPS:]
        return math.fsum(measured) / len(measured)

    for figures in [*ours, *rivals]:
        step = statistics.median(figures["seconds"][WARM_UP_STEPS:])
        lines.append(
            f"{figures['system']:<30} {step:.2f} s a step (mean {mean(figures):.2f}), peak memory "
            f"{figures['peak_mb']:.0f} MB, loss {figures['losses'][0]:.4f} -> {figures['losses'][-1]:.4f}"
        )
    for figures in ours:
        for rival in (rival for rival in rivals if rival["reference"] == figures["reference"]):
            apart = max(abs(a - b) for a, b in zip(figures["losses"], rival["losses"], strict=True))
            lines.append(
                f"{figures['system']}: {mean(rival) / mean(figures):.2f}x the speed of {rival['system']}, "
                f"{figures['peak_mb'] / rival['peak_mb']:.2f} of its memory; losses differ by at most {apart:.1e}"
            )
    return "\n".join(lines)


def run(work: Work, description: str | None) -> None:
    """The body of a benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="measured steps, after two that warm up")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument(
        "--micro-batch", default=work.micro_batch, help="of the section training, default: %(default)s"
    )
    parser.add_argument("--layout", action="append", choices=work.layouts, help="this one alone; default: all")
    parser.add_argument("--no-rival", action="store_true", help="ours alone")
    parser.add_argument("--trl-path", type=Path, help="folder with trl 1.16.0; default: installed once into the cache")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    steps, model = args.steps + WARM_UP_STEPS, resolve_model("asset:smollm2-135m-instruct")
    names = args.layout or list(work.layouts)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows, config = folder / "rows.jsonl", folder / "run.yaml"
        write_rows(rows, model, work, steps * work.batch)
        settings = {"seed": SEED, "steps": steps, "rows": rows, "longest": LONGEST + 1, "model": model}
        config.write_text(RUN.format(**settings, batch=work.batch, micro_batch=args.micro_batch, lr=args.lr))
        records = batches(config, model, work, steps)
        references = [] if args.no_rival else list(dict.fromkeys(work.layouts[name].reference for name in names))
        rivals = [run_rival(folder, model, work, records, reference, args) for reference in references]
        ours = [run_ours(folder, config, work, name) for name in names]
    print(report(ours, rivals, records, work))
    if args.json:
        args.json.write_text(json.dumps({"ours": ours, "rivals": rivals}, indent=2) + "\n")

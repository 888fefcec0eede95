"""Predicted and measured memory and time of real learners: `python benchmarks/planner.py`.

Each configuration trains SmolLM2-135M in a process of its own, through the actors that a run uses: log-probabilities
(or values) of rollouts, then one update of two optimiser steps. Peak memory is the kernel's high-water mark of
resident memory (VmHWM). The time is compared at this machine's rate of matrix products, measured next to it.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from alignment.config import (
    AdapterConfig,
    CriticConfig,
    ModelConfig,
    PolicyConfig,
    PpoConfig,
    RewardModelTrainingConfig,
)
from alignment.planning.memory import MB, MicroBatch, Training, learner_memory
from alignment.planning.processes import ADAPTER_BASE, PROCESS_BASE, QUANTIZATION_BASE
from alignment.planning.shape import ModelShape, read_shape
from alignment.planning.speed import calibrate, update_operations

ANSWER = 64
EPOCHS = 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration of a learner."""

    role: str = "policy"
    rows: int
    tokens: int = 160
    micro_batches: int = 2
    dtype: str = "float32"
    checkpointing: bool = False
    adapter: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sequences(self) -> int:
        return self.rows * self.micro_batches

    @property
    def training(self) -> Training:
        settings = AdapterConfig(**self.adapter)
        return Training(
            r=settings.r,
            last_layers=settings.last_layers,
            quantization=settings.quantization,
            checkpointing=self.checkpointing,
            accumulates=self.micro_batches > 1,
        )


CASES = {
    "policy, full, 2 x 160": Case(rows=2),
    "policy, LoRA, 4 x 160": Case(rows=4, adapter={"r": 16}),
    "policy, LoRA on 10 layers, 4 x 160": Case(rows=4, adapter={"r": 16, "last_layers": 10}),
    "policy, full, checkpointing, 8 x 160": Case(rows=8, checkpointing=True),
    "critic, full, 4 x 160": Case(role="critic", rows=4),
    "critic, full, bfloat16, 4 x 160": Case(role="critic", rows=4, dtype="bfloat16"),
    "policy, LoRA on four bits, 2 x 160": Case(rows=2, adapter={"r": 16, "quantization": "nf4"}),
    "reward model, full, 2 pairs of 160": Case(role="reward_model", rows=4),
}


def predicted_mb(case: Case, shape: ModelShape) -> float:
    """Of the process, imports included."""
    micro = MicroBatch(rows=case.rows, longest=case.tokens, answer=ANSWER)
    memory = learner_memory(shape, case.training, micro, dtype=case.dtype, scalar_head=case.role != "policy")
    quantized = case.training.quantization != "none"
    base = PROCESS_BASE + ADAPTER_BASE * bool(case.adapter) + QUANTIZATION_BASE * quantized
    return (base + memory.total) / MB


def predicted_seconds(case: Case, shape: ModelShape, rate: float) -> float:
    """Of the update."""
    positions = case.sequences * ANSWER if case.role == "policy" else 0
    operations = update_operations(
        shape, case.training, sequences=case.sequences, longest=case.tokens, positions=positions
    )
    return (1 if case.role == "reward_model" else EPOCHS) * operations / rate


def measure(case: Case, model_path: str) -> dict[str, float]:
    """Train in this process, and report its peak and the seconds of the update."""
    from actors.local import LocalGroup

    group = LocalGroup({case.role: _actor(case, model_path)}, threads=None)
    group.start()
    batch = _pairs(case) if case.role == "reward_model" else _experience(case, group)
    if case.role == "reward_model":  # one optimiser step an update: the second is the first that has moments
        group.call(case.role, "update", batch, step=0)
    start = time.perf_counter()
    group.call(case.role, "update", batch, step=1)
    seconds = time.perf_counter() - start
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    return {"peak_mb": peak / 1024, "seconds": seconds}


def _actor(case: Case, path: str) -> Any:
    from actors import CriticActor, PolicyActor
    from actors.reward_training import RewardTrainingActor

    model = ModelConfig.model_validate(
        {"path": path, "dtype": case.dtype, "gradient_checkpointing": case.checkpointing}
    )
    adapter = AdapterConfig(**case.adapter)
    ppo = PpoConfig(rollout_batch_size=case.sequences, minibatch_size=case.sequences, ppo_epochs=EPOCHS)
    shared: dict[str, Any] = {"model_path": path, "model": model, "total_updates": 10, "seed": 1}
    if case.role == "policy":
        own = PolicyConfig(adapter=adapter, micro_batch_size=case.rows)
        return PolicyActor(policy=own, ppo=ppo, temperature=1.0, **shared)
    if case.role == "critic":
        return CriticActor(critic=CriticConfig(adapter=adapter, micro_batch_size=case.rows), ppo=ppo, **shared)
    pairs = case.sequences // 2
    training = RewardModelTrainingConfig(adapter=adapter, batch_size=pairs, micro_batch_size=case.rows // 2)
    return RewardTrainingActor(training=training, **shared)


def _ids(generator: random.Random, length: int) -> tuple[int, ...]:
    return tuple(generator.randrange(3, 49_000) for _ in range(length))


def _experience(case: Case, group: Any) -> Any:
    """An experience of rollouts of up to `case.tokens` tokens, after a forward pass over them."""
    import torch

    from alignment.batching import rollout_batch
    from alignment.types import Experience, Prompt, Rollout

    generator = random.Random(0)
    rollouts = [
        Rollout(
            prompt=Prompt(id=str(i), messages=(), prompt_ids=_ids(generator, case.tokens - ANSWER - 5 * (i % 4))),
            sample_index=0,
            response_ids=_ids(generator, ANSWER),
            rollout_logprobs=(-10.8,) * ANSWER,
            finish_reason="length",
            response="",
            weight_version=0,
        )
        for i in range(case.sequences)
    ]
    before = group.call(case.role, "logprobs" if case.role == "policy" else "values", rollouts).result()
    ids, mask, response = rollout_batch(rollouts)
    old = torch.zeros(ids.shape)
    old[response] = torch.cat(before)
    noise = 0.1 * torch.randn(ids.shape, generator=torch.Generator().manual_seed(0)) * response
    return Experience(
        input_ids=ids,
        attention_mask=mask,
        response_mask=response,
        old_logprobs=old,
        rollout_logprobs=old,
        ref_logprobs=old,
        rewards=noise,
        old_values=old,
        advantages=noise,
        returns=noise,
    )


def _pairs(case: Case) -> Any:
    from alignment.types import PreferencePair

    generator = random.Random(0)
    return [
        PreferencePair(
            id=str(i),
            prompt_ids=_ids(generator, case.tokens - ANSWER),
            chosen_ids=_ids(generator, ANSWER),
            rejected_ids=_ids(generator, ANSWER - 5 * (i % 4)),
        )
        for i in range(case.sequences // 2)
    ]


def run_case(name: str, model_path: str) -> dict[str, float]:
    """`measure` in a fresh process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", name, "--model", model_path]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=list(CASES), help="this one alone; default: all")
    parser.add_argument("--model", help="folder; default: SmolLM2-135M")
    parser.add_argument("--measure", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(CASES[args.measure], args.model)))
        return
    from alignment.data.model_assets import resolve_model

    path = args.model or resolve_model("asset:smollm2-135m-instruct")
    shape = read_shape(path)
    heads = f"{'predicted':>10} {'measured':>10} {'ratio':>6}"
    print(f"{'memory and time':<38} {heads}   {heads}")
    rows = []
    for name in args.case or CASES:
        case = CASES[name]
        rates = calibrate(shape, dtype=case.dtype, device="cpu", seconds=1.0)
        found = run_case(name, path)
        memory, seconds = (
            predicted_mb(case, shape),
            predicted_seconds(case, shape, rates.tflops * 1e12 * rates.efficiency),
        )
        rows.append({"case": name, **asdict(case), "predicted_mb": memory, "predicted_seconds": seconds, **found})
        print(
            f"{name:<38} {memory:>7,.0f} MB {found['peak_mb']:>7,.0f} MB {memory / found['peak_mb']:>6.2f}   "
            f"{seconds:>8.1f} s {found['seconds']:>8.1f} s {seconds / found['seconds']:>6.2f}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

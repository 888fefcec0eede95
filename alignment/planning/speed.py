"""Time of a PPO step: operations of every phase by a rate of matrix products, decoding by a rate of memory too.

A forward pass costs 2 operations per weight and token and 4 q T per token and layer for attention; a backward pass
twice as much, once for the inputs' gradients and once for the weights'. Under LoRA the second part is the adapters'
alone and nothing is computed below them; gradient checkpointing computes the forward of trained layers once more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from alignment.config import ClusterConfig, PpoRunConfig
from alignment.planning.memory import WIDTHS, Training, weight_bytes
from alignment.planning.processes import reward_shape_names, sequences_of_a_step, training_of
from alignment.planning.shape import ModelShape


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Of one worker's device."""

    tflops: float
    """Matrix products, 10^12 operations a second."""
    gbps: float
    """Memory, 10^9 bytes a second."""
    efficiency: float
    """Share of `tflops` that training and scoring reach."""


CPU_EFFICIENCY = 0.67
"""Measured, see docs/benchmarks.md: the rest is attention, element-wise layers and the gradient of the embedding."""
GPU_EFFICIENCY = 0.4
"""An assumption, what full-size models commonly report; measure your own with --efficiency."""
KNOWN = {"h200": Rates(tflops=790.0, gbps=4300.0, efficiency=GPU_EFFICIENCY)}
"""Measured in bfloat16 by this project: the largest rate of a product and of a copy on one H200."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Operations of a pass of one model over some tokens."""

    forward: float
    backward: float


def forward_operations(shape: ModelShape, *, sequences: float, longest: float, positions: float) -> float:
    """Of the layers on `sequences` x `longest` tokens, and of the head at `positions` of them."""
    tokens = sequences * longest
    matrices = sum(matrix.weights for matrix in shape.matrices)
    attention = 4 * shape.heads * shape.head_dim * longest
    return tokens * shape.layers * (2 * matrices + attention) + 2 * shape.embedding * positions


def update_operations(
    shape: ModelShape, training: Training, *, sequences: float, longest: float, positions: float
) -> float:
    """Forward and backward of one epoch."""
    forward = forward_operations(shape, sequences=sequences, longest=longest, positions=positions)
    if not training.r:
        return forward * (4 if training.checkpointing else 3)
    share = shape.adapted_layers(training.last_layers) / shape.layers
    head = 2 * shape.embedding * positions
    adapters = shape.adapter_parameters(training.r, training.target_modules, training.last_layers)
    again = 2 if training.checkpointing else 1
    return forward + share * again * (forward - head) + head + 6 * adapters * sequences * longest


def decode_seconds(shape: ModelShape, rates: Rates, *, rows: int, steps: int, dtype: str) -> float:
    """`steps` tokens for each of `rows`: every step reads all weights and multiplies `rows` vectors with them."""
    memory = weight_bytes(shape, dtype=dtype) / (rates.gbps * 1e9)
    operations = 2 * (shape.backbone + shape.embedding) * rows / (rates.tflops * 1e12)
    return steps * max(memory, operations)


def phase_seconds(
    config: PpoRunConfig,
    cluster: ClusterConfig,
    shapes: Mapping[str, ModelShape],
    rates: Rates,
    *,
    prompt_tokens: float | None = None,
) -> dict[str, float]:
    """Seconds of each phase of a step; without GPUs the roles of a machine follow one another.

    `prompt_tokens`: mean length of a prompt; None takes the limit.
    """
    sequences = sequences_of_a_step(config)
    new, prompt = config.rollout.max_new_tokens, prompt_tokens or config.data.max_prompt_tokens
    longest, answers = prompt + new, sequences * new
    rate = rates.tflops * 1e12 * rates.efficiency

    def by_role(role: str, operations: float) -> float:
        settings = getattr(cluster, role)
        return operations / rate / (settings.num_workers if settings.gpus_per_worker else 1)

    def forward(role: str, shape: ModelShape, positions: float) -> float:
        return by_role(role, forward_operations(shape, sequences=sequences, longest=longest, positions=positions))

    def update(role: str, positions: float) -> float:
        training = training_of(
            shapes[role],
            getattr(config, role).adapter,
            getattr(cluster, role),
            checkpointing=config.model.gradient_checkpointing,
            micro_batches=2,
        )
        operations = update_operations(
            shapes[role], training, sequences=sequences, longest=longest, positions=positions
        )
        return config.ppo.ppo_epochs * by_role(role, operations)

    share = -(-sequences // cluster.rollout.num_engines)
    rows = min(share, config.rollout.max_batch)
    prefill = forward_operations(shapes["policy"], sequences=share, longest=prompt, positions=0) / rate
    decode = decode_seconds(shapes["policy"], rates, rows=rows, steps=new, dtype=config.model.dtype)
    engines_at_once = 1 if cluster.rollout.gpus_per_worker else cluster.rollout.num_engines
    phases = {
        "generate": engines_at_once * (prefill + -(-share // rows) * decode) / cluster.rollout.tensor_parallel_size,
        "reference": forward("reference", shapes["policy"], answers),
        "score": sum(
            forward("reward_model", shapes.get(name, shapes["reward_model"]), 0) for name in reward_shape_names(config)
        ),
        "old logprobs": 0.0 if config.ppo.one_pass else forward("policy", shapes["policy"], answers),
        "values": 0.0 if config.ppo.one_pass else forward("critic", shapes["critic"], 0),
        "policy update": update("policy", answers),
        "critic update": update("critic", 0),
    }
    return {phase: seconds for phase, seconds in phases.items() if seconds}


def calibrate(shape: ModelShape, *, dtype: str, device: str, seconds: float = 3.0) -> Rates:
    """Measure one product of the model's feed-forward shape and one copy of memory on this machine."""
    import torch

    kind = {4: torch.float32, 2: torch.bfloat16}[WIDTHS[dtype]]
    left = torch.randn(1024, shape.hidden, dtype=kind, device=device)
    right = torch.randn(shape.hidden, shape.intermediate, dtype=kind, device=device)
    source = torch.zeros(2**26, dtype=torch.float32, device=device)  # 256 MB: beyond any cache
    target = torch.empty_like(source)

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    product = _best(lambda: torch.mm(left, right), wait, seconds)
    copy = _best(lambda: target.copy_(source), wait, seconds)
    return Rates(
        tflops=2 * 1024 * shape.hidden * shape.intermediate / product / 1e12,
        gbps=2 * source.nbytes / copy / 1e9,
        efficiency=CPU_EFFICIENCY if device == "cpu" else GPU_EFFICIENCY,
    )


def _best(call: Callable[[], object], wait: Callable[[], None], seconds: float) -> float:
    call()
    wait()
    best, end = float("inf"), time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        call()
        wait()
        best = min(best, time.perf_counter() - start)
    return best


def speed_table(phases: Mapping[str, float], *, steps: int, gpus: float, rates: Rates) -> str:
    """Seconds of each phase, of a step, and hours of the run."""
    step = sum(phases.values())
    lines = [f"{phase:<28} {seconds:>10.2f} s" for phase, seconds in phases.items()]
    lines.append(f"{'step':<28} {step:>10.2f} s")
    hours = step * steps / 3600
    lines.append(
        f"{steps} steps: {hours:.2f} hours, {hours * gpus:.2f} GPU-hours on {gpus:g} GPUs; held-out answers, "
        "checkpoints and waiting not counted"
    )
    lines.append(f"at {rates.tflops:.4g} TFLOP/s x {rates.efficiency:g} and {rates.gbps:.4g} GB/s")
    return "\n".join(lines)

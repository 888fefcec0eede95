"""Real processes over gloo: the same few updates under every engine, and what a checkpoint of each holds."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ENGINES = {
    "ddp": {"engine": "torch", "zero_stage": 0},
    "fsdp2, weights kept": {"engine": "torch", "zero_stage": 2},
    "fsdp2": {"engine": "torch", "zero_stage": 3},
    "zero 0": {"engine": "deepspeed", "zero_stage": 0},
    "zero 1": {"engine": "deepspeed", "zero_stage": 1},
    "zero 2": {"engine": "deepspeed", "zero_stage": 2},
    "zero 3": {"engine": "deepspeed", "zero_stage": 3},
}


def on_processes(size: int, work: str, *args: Any, folder: Path) -> list[Any]:
    """`work(ranks, *args)`, a function of this file, on `size` processes; what each returned, through JSON."""
    mp.spawn(_member, (size, work, args, str(folder)), nprocs=size)
    return [json.loads((folder / f"{work}_{rank}.json").read_text()) for rank in range(size)]


def _member(rank: int, size: int, work: str, args: tuple[Any, ...], folder: str) -> None:
    from alignment.distributed import GroupRanks
    from alignment.models import quiet_transformers

    quiet_transformers()
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, f"store_{work}"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=40))
    answer = globals()[work](GroupRanks(dist.group.WORLD), *args)
    Path(folder, f"{work}_{rank}.json").write_text(json.dumps(answer))
    dist.destroy_process_group()


def policy_losses(ranks: Any, folder: str, steps: int = 5) -> dict[str, dict[str, Any]]:
    """Loss, KL and gradient norm of each step, and the weights at the end, under every engine, full and LoRA."""
    from tiny_learners import experience_of, rollouts_of

    report = {}
    for name, settings in ENGINES.items():
        for lora in (False, True):
            learner = learner_of(ranks, folder, settings, lora=lora)
            rows = [learner.update(experience_of(rollouts_of(11, seed=s)), step=s) for s in range(steps)]
            report[f"{name}, {'LoRA' if lora else 'full'}"] = {"rows": rows, "weights": weights(learner)}
    return report


def learner_of(ranks: Any, folder: str, settings: dict[str, Any], *, lora: bool) -> Any:
    from alignment import adapters, models
    from alignment.engines.make import make_engine
    from alignment.learners.ppo import PolicyLearner
    from alignment.packing import MicroBatchLimit

    model = models.load_causal_lm(folder)
    if lora:
        adapters.attach_lora(model.model, r=4, alpha=8, seed=1)
    engine = make_engine(model, ranks=ranks, **settings, lr=1e-3, total_updates=20, max_grad_norm=0.5)
    return PolicyLearner(model, engine, minibatch_size=6, micro_batch_limit=MicroBatchLimit(rows=2))


def weights(learner: Any) -> dict[str, Any]:
    from alignment.sharding import collect

    trained = [(name, p) for name, p in learner.model.named_parameters() if p.requires_grad]
    return {name: tensor.tolist() for name, tensor in collect(trained, keep=True).items()}

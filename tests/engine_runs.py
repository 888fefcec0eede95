"""Real processes over gloo, each one rank: the same few updates under every engine, and what passes between them."""

from __future__ import annotations

import datetime
import importlib
import json
import os
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from adapter_runs import settings_of
from tiny_learners import experience_of, rollouts_of

from actors.loading import load_trained, save_trained
from alignment import adapters, checkpoint, forward, models
from alignment.distributed import Alone, GroupRanks
from alignment.engines import deepspeed
from alignment.engines.make import make_engine
from alignment.learners.ppo import CriticLearner, PolicyLearner
from alignment.packing import MicroBatchLimit
from alignment.sharding import collect

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"engine": "torch", "zero_stage": 0},
    "fsdp2, layers kept": {"engine": "torch", "zero_stage": 2},
    "fsdp2": {"engine": "torch", "zero_stage": 3},
    "zero 0": {"engine": "deepspeed", "zero_stage": 0},
    "zero 1": {"engine": "deepspeed", "zero_stage": 1},
    "zero 2": {"engine": "deepspeed", "zero_stage": 2},
    "zero 3": {"engine": "deepspeed", "zero_stage": 3},
    "zero 2, moments in host memory": {"engine": "deepspeed", "zero_stage": 2, "offload": "optimizer"},
    "zero 3, all in host memory": {"engine": "deepspeed", "zero_stage": 3, "offload": "all"},
}
RELAY = ["zero 3", "fsdp2", "zero 1", "ddp", "zero 2", "fsdp2, layers kept", "zero 0", "zero 3"]
"""Each pair of neighbours is a run that goes on under another engine."""


def on_processes(size: int, work: str, *args: Any, folder: Path) -> list[Any]:
    """`work(ranks, *args)`, a function of this file or `module.function` of another one's, on `size` processes; what
    each returned, through JSON."""
    folder.mkdir()
    mp.spawn(_member, (size, work, args, str(folder)), nprocs=size)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


def _member(rank: int, size: int, work: str, args: tuple[Any, ...], folder: str) -> None:
    models.quiet_transformers()
    deepspeed.PERSISTENT_ELEMENTS = 0  # these models are tiny: otherwise stage 3 would split nothing
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=120))
    module, _, name = work.rpartition(".")
    function = getattr(importlib.import_module(module), name) if module else globals()[name]
    answer = function(GroupRanks(dist.group.WORLD), *args)
    Path(folder, f"{rank}.json").write_text(json.dumps(answer))
    dist.barrier()
    os._exit(0)  # how libraries take leave of each other is not what is tested


def learner_of(
    ranks: Any, folder: str, engine: str, *, lora: bool, dtype: str = "float32", checkpointing: bool = False
) -> PolicyLearner:
    model = models.load_causal_lm(folder, dtype=models.DTYPES[dtype])
    if lora:
        # The layer below has nothing to train, and the backward pass ends above it.
        adapters.attach_lora(model.model, r=4, alpha=8, last_layers=1, seed=1)
    if checkpointing:
        models.enable_gradient_checkpointing(model)
    settings = {"lr": 1e-3, "total_updates": 40, "max_grad_norm": 0.5, "weight_decay": 0.1}
    made = make_engine(model, ranks=ranks, **ENGINES[engine], **settings)
    # 11 rows in minibatches of 6: shares differ in length and in number, and a rank of three may have none.
    return PolicyLearner(model, made, minibatch_size=6, micro_batch_limit=MicroBatchLimit(rows=2))


def update(learner: PolicyLearner, step: int) -> dict[str, float]:
    return learner.update(experience_of(rollouts_of(11 if step % 2 else 2, seed=step)), step=step)


def weights(learner: PolicyLearner | CriticLearner) -> dict[str, Any]:
    trained = [(name, p) for name, p in learner.model.named_parameters() if p.requires_grad]
    return {name: tensor.tolist() for name, tensor in collect(trained, keep=True).items()}


def policy_updates(ranks: Any, folder: str, engines: list[str], checkpointing: bool) -> dict[str, Any]:
    """Metrics of each step, the log-probabilities after them, and the weights, under each engine, full and LoRA."""
    report = {}
    for engine in engines:
        for lora in (False, True):
            learner = learner_of(ranks, folder, engine, lora=lora, checkpointing=checkpointing)
            # All rollouts are the first rank's, and none the others': they take part all the same.
            own = rollouts_of(5, seed=9) if ranks.rank == 0 else []
            # A reference that is the policy without its adapter comes first in a step of one pass.
            with adapters.adapter_disabled(learner.model.model):
                reference = learner.logprobs(own)
            rows = [update(learner, step) for step in range(5)]
            experience = experience_of(rollouts_of(7, seed=5))
            rows.append(learner.update_on_policy(experience, step=5))
            report[f"{engine}, {'LoRA' if lora else 'full'}"] = {
                "rows": rows,
                "logprobs": [row.tolist() for row in [*reference, *learner.logprobs(own)]],
                "weights": weights(learner),
            }
    return report


def method_updates(ranks: Any, folder: str, cases: list[list[str]], saved: str) -> dict[str, Any]:
    """Metrics of a few updates, the base's log-probabilities, and what was trained, per kind of adapter and engine;
    adapters are saved in `saved`, each by its kind."""
    report = {}
    for kind, engine in cases:
        model = models.load_causal_lm(folder)
        method = adapters.attach(model, type=kind, seed=1, total_updates=12, **settings_of(kind))  # type: ignore[arg-type]
        settings = {"lr": 1e-2, "total_updates": 12, "max_grad_norm": 0.5}
        made = make_engine(model, ranks=ranks, **ENGINES[engine], **settings)
        limit = MicroBatchLimit(rows=2)
        learner = PolicyLearner(model, made, minibatch_size=6, micro_batch_limit=limit, method=method)
        with adapters.adapter_disabled(model.model):
            base = learner.logprobs(rollouts_of(5, seed=9))
        rows = [update(learner, step) for step in range(4)]
        if adapters.has_adapter(model.model):
            adapters.save_adapter(model.model, Path(saved, kind), base="base", write=ranks.rank == 0)
        merged = adapters.merged_weights(model.model) if adapters.mergeable(kind) else iter(())
        report[f"{kind}, {engine}"] = {
            "rows": rows,
            "base": [row.tolist() for row in base],
            "weights": weights(learner),
            "merged": {name: tensor.tolist() for name, tensor in merged},
        }
    return report


def value_updates(ranks: Any, folder: str, engines: list[str]) -> dict[str, Any]:
    """The critic's values and update in one pass, twice, under each engine; and a gradient that is not a number."""
    report = {}
    for engine in engines:
        model = models.load_scalar_model(folder, head="random", seed=3)
        settings = {"lr": 1e-3, "total_updates": 20, "max_grad_norm": 0.5}
        made = make_engine(model, ranks=ranks, **ENGINES[engine], **settings)
        learner = CriticLearner(model, made, minibatch_size=7, micro_batch_limit=MicroBatchLimit(rows=2))
        rows, values = [], []
        for step in range(2):
            rollouts = rollouts_of(7, seed=step)
            rewards = [torch.linspace(-1, 1, len(rollout.response_ids)) for rollout in rollouts]
            now, metrics = learner.fit(rollouts, [torch.empty(0), *rewards[1:]], gamma=1.0, gae_lambda=0.9)
            rows.append(metrics)
            values.append(torch.cat(now).tolist())
        before = weights(learner)
        # On one rank alone.
        made.backward(forward.idle_output(model) * (float("nan") if ranks.rank == ranks.size - 1 else 1.0))
        skipped = made.step()["skipped_count"]
        report[engine] = {"rows": rows, "values": values, "skipped": skipped, "same": weights(learner) == before}
    return report


def relay_of(ranks: Any, folder: str, saved: str, lora: bool) -> list[dict[str, float]]:
    """Step 0 alone has been saved in `saved`; each engine of the relay makes one more step and hands over."""
    rows = []
    for step, engine in enumerate(RELAY, start=1):
        learner = learner_of(ranks, folder, engine, lora=lora)
        load_trained(learner.model, learner, Path(saved))
        rows.append(update(learner, step))
        ranks.gather("loaded")  # nobody writes while another still reads
        save_trained(learner.model, learner, Path(saved), folder)
        ranks.gather("saved")
    return rows


def trips_of(ranks: Any, folder: str, saved: str, lora: bool, dtype: str) -> dict[str, bool]:
    """Whether what each engine loads from `saved` is what it would save, and it sends weights one by one."""
    expected = checkpoint.load_state(Path(saved) / "learner.pt")["engine"]
    report = {}
    for engine in ENGINES:
        if dtype != "float32" and engine in ("zero 0", "zero 1"):
            continue  # refused
        learner = learner_of(ranks, folder, engine, lora=lora, dtype=dtype)
        load_trained(learner.model, learner, Path(saved))
        state = learner.engine.state_dict()
        alive = most_alive(learner)
        adapters.export_merged(learner.model.model, Path(saved, engine), write=ranks.rank == 0)
        report[engine] = ranks.rank > 0 or (same(state, expected) and alive <= 2 and exported_alike(saved, engine))
    return report


def exported_alike(saved: str, engine: str) -> bool:
    """Whether the finished model is, byte for byte, what one process exports."""
    ours, theirs = (
        Path(folder, "model.safetensors").read_bytes() for folder in (f"{saved}/{engine}", f"{saved}/alone")
    )
    return ours == theirs


def most_alive(learner: PolicyLearner) -> int:
    """Matrices that are whole at one time while weights are sent: the one in use, and the next as it is gathered."""
    seen: list[weakref.ref[torch.Tensor]] = []
    most = 0
    for _, tensor in adapters.merged_weights(learner.model.model, whole=True):
        seen.append(weakref.ref(tensor))
        most = max(most, sum(one() is not None for one in seen))
    return most


def bytes_of_ranks(ranks: Any, folder: str, dtype: str) -> dict[str, dict[str, int]]:
    """What this rank holds after an update under each engine: weights, masters and moments."""
    report = {}
    for engine in ENGINES:
        if dtype != "float32" and engine in ("zero 0", "zero 1"):
            continue  # refused
        learner = learner_of(ranks, folder, engine, lora=False, dtype=dtype)
        update(learner, 1)
        made: Any = learner.engine
        if hasattr(made, "_masters"):
            masters, optimizer = list(made._masters.values()), made.optimizer
        else:
            masters = made._flat_parts() if made.zero_stage else []
            optimizer = made.engine.optimizer.optimizer if made.zero_stage else made.engine.optimizer
        moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        parameters = list(learner.model.parameters())
        report[engine] = {
            name: sum(_part(tensor).nbytes for tensor in tensors)
            for name, tensors in (("weights", parameters), ("masters", masters), ("moments", moments))
        }
    return report


def _part(tensor: Any) -> torch.Tensor:
    """What of a parameter is in this process."""
    if hasattr(tensor, "ds_tensor"):
        tensor = tensor.ds_tensor
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def same(ours: Any, theirs: Any) -> bool:
    """Equal to the last bit."""
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    return torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


def alone(folder: str, saved: Path, steps: int, *, lora: bool, dtype: str = "float32") -> list[dict[str, float]]:
    """So many steps in one process of plain torch, the first of them saved."""
    learner = learner_of(Alone(), folder, "ddp", lora=lora, dtype=dtype)
    rows = []
    for step in range(steps):
        rows.append(update(learner, step))
        if step == 0:
            saved.mkdir()
            save_trained(learner.model, learner, saved, folder)
            adapters.export_merged(learner.model.model, saved / "alone")
    return rows

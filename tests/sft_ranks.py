"""Supervised updates on real processes over gloo, each one rank."""

from __future__ import annotations

from typing import Any

from engine_runs import ENGINES
from tiny_sft import examples_of

from alignment import adapters, models
from alignment.engines.make import make_engine
from alignment.learners.sft import SftLearner
from alignment.packing import MicroBatchLimit
from alignment.sharding import collect


def updates(ranks: Any, folder: str, engines: list[str]) -> dict[str, Any]:
    """Metrics of five steps, validation after them and the weights, under each engine: full, LoRA, and with noise on
    the embeddings. Batches of 7 and of 2: shares differ, and a rank of three may have none."""
    report = {}
    for engine in engines:
        for case in ("full", "LoRA", "noise"):
            model = models.load_causal_lm(folder, layout="packed")
            if case == "LoRA":
                adapters.attach_lora(model.model, r=4, alpha=8, seed=1)
            settings = {"lr": 1e-3, "total_updates": 20, "max_grad_norm": 0.5, "weight_decay": 0.1}
            learner = SftLearner(
                model,
                make_engine(model, ranks=ranks, **ENGINES[engine], **settings),
                micro_batch_limit=MicroBatchLimit(rows=3, tokens=50, layout=model.layout),
                neftune_alpha=5.0 if case == "noise" else 0.0,
            )
            rows = [learner.update(examples_of(2 if step % 2 else 7, seed=step), step=step) for step in range(5)]
            # All examples are the first rank's, and none the others': they take part all the same.
            sums = learner.nll(examples_of(5, seed=9) if ranks.rank == 0 else [])
            trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            weights = {name: tensor.tolist() for name, tensor in collect(trained, keep=True).items()}
            report[f"{engine}, {case}"] = {"rows": rows, "nll": sums, "weights": weights}
    return report

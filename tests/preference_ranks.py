"""Updates from pairs and labels on real processes over gloo, each one rank."""

from __future__ import annotations

from typing import Any

from engine_runs import ENGINES
from tiny_preferences import feedback_update, labels_of, loaded, objective_of, pairs_of, reference_of

from alignment.engines.make import make_engine
from alignment.learners.dpo import DpoLearner
from alignment.learners.kto import BcoLearner, KtoLearner, mismatched
from alignment.packing import MicroBatchLimit
from alignment.sharding import collect


def learner_of(kind: type, ranks: Any, folder: str, engine: str, **settings: Any) -> Any:
    model = loaded(folder, layout="packed")
    schedule = {"lr": 1e-3, "total_updates": 20, "max_grad_norm": 0.5, "weight_decay": 0.1}
    made = make_engine(model, ranks=ranks, **ENGINES[engine], **schedule)
    limit = MicroBatchLimit(rows=3, tokens=60, layout=model.layout)
    return kind(model, made, micro_batch_limit=limit, **settings)


def updates(ranks: Any, folder: str, reference: str, engines: list[str]) -> dict[str, Any]:
    """Metrics of four steps of each learner and the weights after them, under each engine. Batches of 7 and of 2:
    shares differ, and a rank of three may have none."""
    objective = objective_of("sigmoid", ("sft", 0.5, False), length_alpha=0.5)
    report = {}
    for engine in engines:
        for case, kind, settings in (
            ("DPO", DpoLearner, {"objective": objective}),
            ("DPO, shared prompts", DpoLearner, {"objective": objective, "share_prompts": True}),
            ("KTO", KtoLearner, {"undesirable_weight": 1.3}),
            ("KTO, shared prompts", KtoLearner, {"undesirable_weight": 1.3, "share_prompts": True}),
            ("BCO", BcoLearner, {}),
        ):
            learner = learner_of(kind, ranks, folder, engine, **settings)
            rows = [_update(learner, reference, 2 if step % 2 else 7, step) for step in range(4)]
            # All records are the first rank's, and none the others': they take part all the same.
            records = pairs_of(5) if kind is DpoLearner else labels_of(5)
            sums = learner.logps(records if ranks.rank == 0 else [])
            trained = list(learner.model.named_parameters())
            weights = {name: tensor.tolist() for name, tensor in collect(trained, keep=True).items()}
            report[f"{engine}: {case}"] = {"rows": rows, "logps": sums, "weights": weights}
    return report


def _update(learner: Any, folder: str, count: int, step: int) -> dict[str, float]:
    if isinstance(learner, DpoLearner):
        pairs = pairs_of(count, seed=step)
        return learner.update(pairs, reference_of(folder, pairs, length_alpha=0.5), step=step)
    records = labels_of(count, seed=step)
    if isinstance(learner, KtoLearner):
        # A reference that is less certain, so that the baseline is above 0.
        ref, others = (reference_of(folder, part) for part in (records, mismatched(records)))
        return learner.update(records, ref, [value - 60 for value in others], step=step)
    return feedback_update(learner, folder, records, step=step)

"""Learners from pairs and from labels on tiny models, and records for them: token 11 is good, 13 is bad."""

from __future__ import annotations

from typing import Any

from tiny_judgements import judgements_of

from alignment import adapters, models
from alignment.config import SourceConfig
from alignment.config.judged_data import PairsDataConfig
from alignment.data.split import Split
from alignment.data.tasks import load_pair_tasks
from alignment.engines.torch import TorchEngine
from alignment.learners.answers import answer_logps
from alignment.learners.dpo import DpoLearner, pair_logps
from alignment.learners.kto import BcoLearner, KtoLearner, mismatched
from alignment.packing import MicroBatchLimit
from alignment.preference_objectives import PreferenceObjective, Term
from alignment.types import PreferencePair

LIMIT = MicroBatchLimit(rows=4)


def read_pairs(source: SourceConfig, tokenizer: Any, *, eos_ids: Any = None, **options: Any) -> Split[PreferencePair]:
    """The pairs of one source, by the door that runs take. `options`: of `PairsDataConfig`."""
    config = PairsDataConfig.model_validate({"sources": [source.model_dump()], "held_out": 0, **options})
    (split,) = load_pair_tasks(config, tokenizer, eos_ids=eos_ids, seed=1).splits.values()
    return split


def loaded(folder: Any, *, lora: bool = False, layout: str = "padded") -> Any:
    model = models.load_causal_lm(str(folder), layout=layout)
    if lora:
        adapters.attach_lora(model.model, r=4, alpha=8, seed=1)
    return model


def engine_of(model: Any, lr: float) -> TorchEngine:
    return TorchEngine(model.named_parameters(), lr=lr, total_updates=60, max_grad_norm=1e9)


def objective_of(*kinds: Any, **settings: Any) -> PreferenceObjective:
    """Terms by their kind, or by (kind, weight, per_token)."""
    named = [(kind, 1.0, False) if isinstance(kind, str) else kind for kind in kinds or ("sigmoid",)]
    terms = tuple(Term(kind=kind, weight=weight, per_token=per_token) for kind, weight, per_token in named)
    return PreferenceObjective(terms=terms, **settings)


def dpo_learner(
    folder: Any,
    *,
    rows: int = 4,
    lr: float = 1e-3,
    lora: bool = False,
    layout: str = "padded",
    objective: Any = None,
    **settings: Any,
) -> DpoLearner:
    model = loaded(folder, lora=lora, layout=layout)
    limit = MicroBatchLimit(rows=rows, layout=model.layout)
    return DpoLearner(model, engine_of(model, lr), micro_batch_limit=limit, objective=objective, **settings)


def feedback_learner(
    kind: type, folder: Any, *, rows: int = 4, lr: float = 1e-3, layout: str = "padded", **settings: Any
) -> Any:
    model = loaded(folder, layout=layout)
    limit = MicroBatchLimit(rows=rows, layout=model.layout)
    return kind(model, engine_of(model, lr), micro_batch_limit=limit, **settings)


def reference_of(folder: Any, records: Any, *, length_alpha: float = 1.0) -> Any:
    """What another tiny model says of pairs, or of labelled answers."""
    model = loaded(folder)
    if hasattr(records[0], "chosen_ids"):
        return pair_logps(model, records, limit=LIMIT, length_alpha=length_alpha)
    return answer_logps(model, [(record.prompt_ids, record.answer_ids) for record in records], limit=LIMIT)


def feedback_update(learner: Any, folder: Any, records: Any, *, step: int = 0) -> dict[str, float]:
    """An update of either kind, with the reference that lies in `folder`."""
    reference = reference_of(folder, records)
    if isinstance(learner, BcoLearner):
        return learner.update(records, reference, step=step)
    assert isinstance(learner, KtoLearner)
    return learner.update(records, reference, reference_of(folder, mismatched(records)), step=step)


def pairs_of(count: int, seed: int = 5) -> Any:
    return judgements_of("pairs", count, seed)


def labels_of(count: int, seed: int = 5) -> Any:
    return judgements_of("labels", count, seed)

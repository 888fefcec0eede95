"""Bradley-Terry reward model: a scalar head learns to score the preferred answer higher."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from alignment.adapters import TrainingMethod
from alignment.batching import micro_batches, sequence_batch
from alignment.distributed import Ranks
from alignment.engines.base import Engine
from alignment.forward import idle_output, sequence_scores
from alignment.learners.base import (
    Tally,
    begin_update,
    finish_update,
    load_method,
    method_metrics,
    method_state,
    missing_passes,
    own_micro_batches,
)
from alignment.losses import reward_model_loss
from alignment.models import CausalModel
from alignment.packing import MicroBatchLimit
from alignment.types import PreferencePair


class RewardModelLearner:
    """One update per batch of pairs; both answers of a pair share a forward."""

    def __init__(
        self,
        model: CausalModel,
        engine: Engine,
        *,
        micro_batch_limit: MicroBatchLimit,
        center_coef: float = 0.0,
        device: torch.device | str = "cpu",
        method: TrainingMethod | None = None,
    ) -> None:
        """`method`: what is told of every update."""
        self.model, self.engine, self.method, self.device = model, engine, method, device
        self.micro_batch_limit, self.center_coef = micro_batch_limit, center_coef

    def update(self, pairs: Sequence[PreferencePair], *, step: int) -> dict[str, float]:
        """One optimiser step on `pairs`; the loss is the mean over all of them whatever the micro-batches."""
        tally = Tally(self.engine.ranks)
        tally.begin_minibatch()
        begin_update(self.engine, self.method)
        lengths = torch.tensor(
            [[len(p.prompt_ids) + len(ids) for ids in (p.chosen_ids, p.rejected_ids)] for p in pairs]
        )
        rows, limit = torch.arange(len(pairs)), self.micro_batch_limit
        for index in own_micro_batches(self.model, self.engine, rows, lengths, limit, device=self.device):
            chosen = [pairs[i] for i in index.tolist()]
            sequences = [p.prompt_ids + p.chosen_ids for p in chosen] + [p.prompt_ids + p.rejected_ids for p in chosen]
            ids, mask = sequence_batch(sequences, self.device)
            scores = sequence_scores(self.model, ids, mask)
            better, worse = scores[: len(chosen)], scores[len(chosen) :]
            loss, metrics = reward_model_loss(better, worse, center_coef=self.center_coef, denominator=len(pairs))
            self.engine.backward(loss)
            tally.add({"loss": loss.detach(), **metrics})
        tally.end_minibatch()
        tally.add(finish_update(self.engine, self.method))
        return {**tally.result("reward_model"), **method_metrics(self.method)}

    @torch.no_grad()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """One score per sequence of ids, in the order given. As many a forward as an update's pairs have."""
        rows = self.micro_batch_limit.rows
        limit = dataclasses.replace(self.micro_batch_limit, rows=rows and 2 * rows)
        return score_sequences(self.model, sequences, limit=limit, device=self.device, lockstep=self.engine.lockstep)

    def state_dict(self) -> dict[str, Any]:
        return {"engine": self.engine.state_dict(), **method_state(self.method)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.engine.load_state_dict(state["engine"])
        load_method(self.method, state)


@torch.no_grad()
def score_sequences(
    model: CausalModel,
    sequences: Sequence[Sequence[int]],
    *,
    limit: MicroBatchLimit,
    device: torch.device | str = "cpu",
    lockstep: Ranks | None = None,
) -> list[float]:
    """Scores at the last token of each sequence, in the order given. `lockstep`: as for `per_response`."""
    scores = torch.zeros(len(sequences))
    lengths = torch.tensor([len(s) for s in sequences])
    batches = micro_batches(torch.arange(len(sequences)), lengths, limit)
    for _ in range(missing_passes(len(batches), lockstep)):
        idle_output(model, device)
    for index in batches:
        ids, mask = sequence_batch([sequences[i] for i in index.tolist()], device)
        scores[index] = sequence_scores(model, ids, mask).cpu()
    return scores.tolist()

"""A scalar head learns what people think of answers: from pairs, rankings, ratings, labels or steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from alignment.adapters import TrainingMethod
from alignment.batching import marked_batch, micro_batches
from alignment.distributed import Ranks
from alignment.engines.base import Engine
from alignment.forward import idle_output, marked_scores
from alignment.judgements import Judgement, last_tokens
from alignment.learners.base import Learner, missing_passes
from alignment.models import CausalModel
from alignment.packing import MicroBatchLimit
from alignment.reward_objectives import Objectives


class RewardModelLearner(Learner):
    """One update per batch of records of one kind; all answers of a record share a forward."""

    def __init__(
        self,
        model: CausalModel,
        engine: Engine,
        *,
        micro_batch_limit: MicroBatchLimit,
        objectives: Objectives | None = None,
        device: torch.device | str = "cpu",
        method: TrainingMethod | None = None,
    ) -> None:
        """
        Args:
            micro_batch_limit: its rows are records.
            method: what is told of every update.
        """
        super().__init__(model, engine, micro_batch_limit=micro_batch_limit, method=method, device=device)
        self.objectives = objectives or Objectives()

    def update(self, records: Sequence[Judgement], *, step: int) -> dict[str, float]:
        """One optimiser step; the loss is the mean over all of the batch whatever the micro-batches."""
        tally = self._begin()
        denominator = self.objectives.denominator(records)
        for index in self._micro_batches(_lengths(records)):
            chosen = [records[i] for i in index.tolist()]
            sequences = [ids for record in chosen for ids in record.sequences]
            reads = [positions for record in chosen for positions in record.reads]
            scores = marked_scores(self.model, *marked_batch(sequences, reads, self.device))
            loss, metrics = self.objectives.loss(chosen, scores, denominator=denominator)
            self.engine.backward(loss)
            tally.add({"loss": loss.detach(), **metrics})
        tally.end_minibatch()
        return self._finish(tally, "reward_model")

    @torch.no_grad()
    def scores(self, records: Sequence[Judgement]) -> list[tuple[float, ...]]:
        """Of each record the scores at its reads, in the order given."""
        widest = max((len(record.sequences) for record in records), default=1)
        rows = self.micro_batch_limit.rows
        found = iter(
            read_scores(
                self.model,
                [ids for record in records for ids in record.sequences],
                [positions for record in records for positions in record.reads],
                limit=dataclasses.replace(self.micro_batch_limit, rows=rows and widest * rows),
                device=self.device,
                lockstep=self.engine.lockstep,
            )
        )
        return [tuple(score for _ in record.sequences for score in next(found)) for record in records]


def _lengths(records: Sequence[Judgement]) -> torch.Tensor:
    """(B, K) tokens of each record's sequences, 0 where it has fewer than K."""
    lengths = [torch.tensor([len(ids) for ids in record.sequences]) for record in records]
    return torch.nn.utils.rnn.pad_sequence(lengths, batch_first=True)


def score_sequences(
    model: CausalModel,
    sequences: Sequence[Sequence[int]],
    *,
    limit: MicroBatchLimit,
    device: torch.device | str = "cpu",
    lockstep: Ranks | None = None,
) -> list[float]:
    """Scores at the last token of each sequence, in the order given. `lockstep`: as for `per_response`."""
    found = read_scores(model, sequences, last_tokens(sequences), limit=limit, device=device, lockstep=lockstep)
    return [score for (score,) in found]


@torch.no_grad()
def read_scores(
    model: CausalModel,
    sequences: Sequence[Sequence[int]],
    reads: Sequence[Sequence[int]],
    *,
    limit: MicroBatchLimit,
    device: torch.device | str = "cpu",
    lockstep: Ranks | None = None,
) -> list[list[float]]:
    """Scores at the positions `reads` of each sequence, in the order given. `lockstep`: as for `per_response`."""
    found: list[list[float]] = [[] for _ in sequences]
    lengths = torch.tensor([len(ids) for ids in sequences])
    batches = micro_batches(torch.arange(len(sequences)), lengths, limit)
    for _ in range(missing_passes(len(batches), lockstep)):
        idle_output(model, device)
    for index in batches:
        chosen = index.tolist()
        batch = marked_batch([sequences[i] for i in chosen], [reads[i] for i in chosen], device)
        parts = marked_scores(model, *batch).cpu().split([len(reads[i]) for i in chosen])
        for i, part in zip(chosen, parts, strict=True):
            found[i] = part.tolist()
    return found

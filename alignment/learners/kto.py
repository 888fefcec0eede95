"""Answers that someone found good or bad teach a policy directly: KTO, BCO."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from alignment.adapters import TrainingMethod
from alignment.aggregation import Metrics
from alignment.engines.base import Engine
from alignment.judgements import LabelledAnswer
from alignment.label_losses import RewardShift, bco_loss, kto_loss, mismatched_kl
from alignment.learners.answers import (
    Answer,
    answer_lengths,
    answer_logprobs,
    answer_logps,
    refuse_unshared,
    sharing_limit,
)
from alignment.learners.base import Learner, Tally
from alignment.logprobs import sequence_logps
from alignment.models import CausalModel
from alignment.packing import MicroBatchLimit
from alignment.shared_prompts import by_prompt

FeedbackLoss = Callable[..., tuple[Tensor, Metrics]]


def mismatched(records: Sequence[LabelledAnswer]) -> list[LabelledAnswer]:
    """Each prompt of a global batch with an answer that was given for another: the next record's, the last with the
    first one's, where all prompts differ.

    Records of one prompt are put together, and the list is turned by as many places as the most frequent prompt has
    records: each answer then comes once. Where more than half of the records are of one prompt, the others' answers
    come again; where all are, each meets the next one's. No record meets its own answer, unless another has the same.

    Raises:
        ValueError: fewer than two.
    """
    if len(records) < 2:
        raise ValueError(
            f"batch_size: got {len(records)} labelled answers, expected two at least, so that an answer meets another "
            "prompt; raise it"
        )
    groups = by_prompt(_answers(records))
    order = [place for group in groups for place in group]
    most, start = max(map(len, groups)), 0
    partners = [0] * len(records)
    for group in groups:
        size = len(group)
        rest = len(order) - size
        for rank, place in enumerate(group):
            ahead = size + (most - size + rank) % rest if rest else rank + 1
            partners[place] = order[(start + ahead) % len(order)]
        start += size
    return [
        dataclasses.replace(record, id=f"{record.id}/mismatched", answer_ids=records[partner].answer_ids)
        for record, partner in zip(records, partners, strict=True)
    ]


class LabelLearner(Learner):
    """What KTO and BCO share: one optimiser step per batch of labelled answers."""

    def __init__(
        self,
        model: CausalModel,
        engine: Engine,
        *,
        micro_batch_limit: MicroBatchLimit,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        method: TrainingMethod | None = None,
        share_prompts: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        """
        Args:
            micro_batch_limit: its rows are answers.
            method: what is told of every update.
            share_prompts: compute once what prompts of a micro-batch begin with in common, see
                `alignment.shared_prompts`.

        Raises:
            ValueError: share_prompts with a model whose answers would then differ.
        """
        if share_prompts:
            refuse_unshared(model)
            micro_batch_limit = sharing_limit(micro_batch_limit)
        super().__init__(model, engine, micro_batch_limit=micro_batch_limit, method=method, device=device)
        self.beta, self.share_prompts = beta, share_prompts
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight

    def logps(self, records: Sequence[LabelledAnswer]) -> list[float]:
        """Log-probability of each answer."""
        return answer_logps(
            self.model,
            _answers(records),
            limit=self.micro_batch_limit,
            device=self.device,
            lockstep=self.engine.lockstep,
            share_prompts=self.share_prompts,
        )

    def _learn(
        self, tally: Tally, records: Sequence[LabelledAnswer], ref_logps: Sequence[float], loss_of: FeedbackLoss
    ) -> None:
        """Gradients and metrics of the whole batch. `loss_of`: `kto_loss` or its like, with its baseline."""
        reference = _reference(records, ref_logps)
        labels = torch.tensor([record.target == 1 for record in records])
        for index in self._micro_batches(answer_lengths(_answers(records))):
            loss, metrics = loss_of(
                self._logps([records[i] for i in index.tolist()]),
                reference[index].to(self.device),
                labels[index].to(self.device),
                beta=self.beta,
                desirable_weight=self.desirable_weight,
                undesirable_weight=self.undesirable_weight,
                denominator=len(records),
                num_desirable=int(labels.sum()),
            )
            self.engine.backward(loss)
            tally.add({"loss": loss.detach(), **metrics})
        tally.end_minibatch()

    def _logps(self, records: Sequence[LabelledAnswer]) -> Tensor:
        answers = _answers(records)
        return sequence_logps(*answer_logprobs(self.model, answers, self.device, share_prompts=self.share_prompts))


class KtoLearner(LabelLearner):
    """Kahneman-Tversky optimisation."""

    def update(
        self,
        records: Sequence[LabelledAnswer],
        ref_logps: Sequence[float],
        mismatched_ref_logps: Sequence[float],
        *,
        step: int,
    ) -> dict[str, float]:
        """One step; neither loss nor baseline depends on how the batch is cut into micro-batches and ranks.

        Args:
            records: the global batch, two at least.
            ref_logps, mismatched_ref_logps: what the frozen reference gives `records` and `mismatched(records)`.

        Returns:
            `kto/loss`, `kto/kl` (the baseline, not below 0), `kto/logps`, of each class that is there
            `kto/rewards/desirable`, `kto/rewards/undesirable`, the optimiser's, the method's.

        Raises:
            ValueError: fewer than two records, or a reference of another number of them.
        """
        others = mismatched(records)
        tally = self._begin()
        baseline = self._kl(others, mismatched_ref_logps)
        self._learn(tally, records, ref_logps, partial(kto_loss, kl_baseline=baseline))
        return self._finish(tally, "kto")

    @torch.no_grad()
    def _kl(self, others: Sequence[LabelledAnswer], ref_logps: Sequence[float]) -> float:
        """Over the whole batch, the same number on all ranks."""
        reference = _reference(others, ref_logps)
        share = 0.0
        for index in self._micro_batches(answer_lengths(_answers(others)), backward=False):
            logps = self._logps([others[i] for i in index.tolist()])
            share += float(mismatched_kl(logps, reference[index].to(self.device), denominator=len(others)))
        return sum(self.engine.ranks.gather(share))


class BcoLearner(LabelLearner):
    """Binary classifier optimisation. Rewards are shifted by what the steps before this one had."""

    def __init__(self, *args: Any, shift_decay: float = 0.9, **kwargs: Any) -> None:
        """
        Args:
            shift_decay: see `RewardShift`; the others as for `LabelLearner`.
        """
        super().__init__(*args, **kwargs)
        self.shift = RewardShift(decay=shift_decay)

    def update(self, records: Sequence[LabelledAnswer], ref_logps: Sequence[float], *, step: int) -> dict[str, float]:
        """As `KtoLearner.update`, without a baseline; `bco/reward_shift` is the one that was used."""
        tally = self._begin()
        self._learn(tally, records, ref_logps, partial(bco_loss, reward_shift=self.shift.value))
        metrics = self._finish(tally, "bco")
        # A batch whose step was skipped has numbers that no later one may stand on.
        if not metrics["bco/skipped_count"]:
            self.shift.update(
                desirable=metrics.get("bco/rewards/desirable"), undesirable=metrics.get("bco/rewards/undesirable")
            )
        return metrics

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "reward_shift": self.shift.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.shift.load_state_dict(state["reward_shift"])


def _answers(records: Sequence[LabelledAnswer]) -> list[Answer]:
    return [(record.prompt_ids, record.answer_ids) for record in records]


def _reference(records: Sequence[LabelledAnswer], ref_logps: Sequence[float]) -> Tensor:
    """(N,)."""
    if len(ref_logps) != len(records):
        raise ValueError(
            f"ref_logps: got {len(ref_logps)} for {len(records)} answers, expected one number for each; compute them"
        )
    return torch.tensor(ref_logps)

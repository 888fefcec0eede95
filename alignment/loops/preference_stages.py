"""What pairs and labels each ask of a policy and its reference, and what is told of held-out rows."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

from alignment.auc import auc, auc_gain
from alignment.bootstrap import paired_bootstrap
from alignment.judgements import LabelledAnswer
from alignment.label_losses import bco_loss, kto_loss
from alignment.learners.dpo import answer_lengths_of, held_out_metrics
from alignment.learners.kto import FeedbackLoss, mismatched
from alignment.preference_losses import counted_lengths
from alignment.preference_objectives import PreferenceObjective
from alignment.types import PreferencePair

R = TypeVar("R", bound=PreferencePair | LabelledAnswer)
Numbers = Sequence[Any]
"""Of each record a log-probability, or those of both answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """What is known of the held-out rows at one moment."""

    logps: Sequence[Numbers]
    """The policy's, of each part of a stage."""
    reference: Sequence[Numbers]
    """Those of the reference that the run began with; empty where there is none."""


class Stage(Protocol, Generic[R]):
    """A kind of records to learn from."""

    def parts(self, records: Sequence[R]) -> list[list[R]]:
        """What the loss of a batch reads log-probabilities of, the batch itself first."""
        ...

    def metrics(self, records: Sequence[R], judged: Judged) -> dict[str, float]:
        """`validation/NAME` of the held-out rows, `validation/loss` among them."""
        ...

    def table(self, records: Sequence[R], before: Judged, after: Judged, *, seed: int) -> dict[str, dict[str, Any]]:
        """The rows of `held_out` in the summary, of all tasks and of each where there are several."""
        ...


@dataclass(frozen=True, slots=True)
class PairStage:
    """DPO and its kin."""

    objective: PreferenceObjective

    def parts(self, records: Sequence[PreferencePair]) -> list[list[PreferencePair]]:
        return [list(records)]

    def metrics(self, records: Sequence[PreferencePair], judged: Judged) -> dict[str, float]:
        found: dict[str, float] = {}
        for task, rows in _by_task(records).items():
            logps, reference = (
                [part[0][i] for i in rows] if part else None for part in (judged.logps, judged.reference)
            )
            assert logps is not None
            own = held_out_metrics(self.objective, [records[i] for i in rows], logps, reference)
            told = own if not task else [f"validation/{name}" for name in ("loss", "accuracy", "margin")]
            found.update({_within(name, task): own[name] for name in told})
        return found

    def table(
        self, records: Sequence[PreferencePair], before: Judged, after: Judged, *, seed: int
    ) -> dict[str, dict[str, Any]]:
        """`implicit_accuracy`: how often the log-ratio to the first reference is the higher one for the chosen answer,
        a tie counting half, so one half before; `implicit_margin`: beta times the gap; `likelihood_accuracy`: how
        often the chosen answer is the more likely one per token."""
        figures: dict[str, tuple[list[float], list[float]]] = {}
        own = [self._likelihood(records, judged) for judged in (before, after)]
        if after.reference:
            gaps = [
                (chosen - ref_chosen) - (rejected - ref_rejected)
                for (chosen, rejected), (ref_chosen, ref_rejected) in zip(
                    after.logps[0], after.reference[0], strict=True
                )
            ]
            figures["implicit_accuracy"] = [0.5] * len(gaps), [_win(gap) for gap in gaps]
            figures["implicit_margin"] = [0.0] * len(gaps), [self.objective.beta * gap for gap in gaps]
        figures["likelihood_accuracy"] = own[0], own[1]
        rows = {}
        for task, index in _by_task(records).items():
            for name, (first, last) in figures.items():
                values = [first[i] for i in index], [last[i] for i in index]
                rows[_within(name, task)] = _gain(*values, [records[i].prompt_ids for i in index], seed)
        return rows

    def _likelihood(self, records: Sequence[PreferencePair], judged: Judged) -> list[float]:
        counted = torch.stack(counted_lengths(*answer_lengths_of(records), alpha=self.objective.length_alpha), 1)
        means = torch.tensor(judged.logps[0], dtype=torch.float64) / counted
        return [_win(chosen - rejected) for chosen, rejected in means.tolist()]


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelStage:
    """KTO and BCO."""

    loss: str = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def parts(self, records: Sequence[LabelledAnswer]) -> list[list[LabelledAnswer]]:
        return [list(records), *([mismatched(records)] if self.loss == "kto" else [])]

    def metrics(self, records: Sequence[LabelledAnswer], judged: Judged) -> dict[str, float]:
        """The baseline is that of the held-out rows, and so is BCO's shift, of a task as of all."""
        logps, reference = (torch.tensor(part[0]) for part in (judged.logps, judged.reference))
        good = torch.tensor(_desirable(records))
        rewards = self.beta * (logps - reference)
        loss_of: FeedbackLoss
        if self.loss == "kto":
            loss_of, zero = kto_loss, (torch.tensor(judged.logps[1]) - torch.tensor(judged.reference[1])).mean()
        else:
            means = [rewards[mask].mean() for mask in (good, ~good) if mask.any()]
            loss_of, zero = bco_loss, torch.stack(means).mean()
        found: dict[str, float] = {}
        for task, index in _by_task(records).items():
            loss, told = loss_of(
                logps[index],
                reference[index],
                good[index],
                zero,
                beta=self.beta,
                desirable_weight=self.desirable_weight,
                undesirable_weight=self.undesirable_weight,
            )
            own = {name: value for name, value in told.items() if not task or name.startswith("rewards/")}
            found.update({_within(f"validation/{name}", task): float(value) for name, value in own.items()})
            found[_within("validation/loss", task)] = float(loss)
            if len(set(good[index].tolist())) == 2:
                found[_within("validation/auc", task)] = auc(rewards[index].tolist(), good[index].tolist())
        return found

    def table(
        self, records: Sequence[LabelledAnswer], before: Judged, after: Judged, *, seed: int
    ) -> dict[str, dict[str, Any]]:
        """`implicit_auc`: how well the log-ratio to the first reference tells desirable answers from others, one half
        before; `likelihood_auc`: how well the log-probability per token does. A task with one class alone has none.
        `desirable_reward`, `undesirable_reward`: beta times that log-ratio, the mean of each class that is there."""
        rewards = [a - b for a, b in zip(after.logps[0], after.reference[0], strict=True)]
        likelihood = [
            [logp / len(record.answer_ids) for record, logp in zip(records, judged.logps[0], strict=True)]
            for judged in (before, after)
        ]
        figures = {"implicit_auc": ([0.0] * len(rewards), rewards), "likelihood_auc": (likelihood[0], likelihood[1])}
        rows = {}
        for task, index in _by_task(records).items():
            own_records = [records[i] for i in index]
            labels, prompts = _desirable(own_records), [record.prompt_ids for record in own_records]
            if len(set(labels)) == 2:
                for name, (first, last) in figures.items():
                    scores = [first[i] for i in index], [last[i] for i in index]
                    rows[_within(name, task)] = auc_gain(*scores, labels, groups=prompts, seed=seed)
            for name, good in (("desirable_reward", True), ("undesirable_reward", False)):
                if own := [i for i in index if (records[i].target == 1) == good]:
                    reward, asked = [self.beta * rewards[i] for i in own], [records[i].prompt_ids for i in own]
                    rows[_within(name, task)] = _gain([0.0] * len(own), reward, asked, seed, higher_is_better=good)
        return rows


def _by_task(records: Sequence[PreferencePair] | Sequence[LabelledAnswer]) -> dict[str, list[int]]:
    """Places of all records under "", and where there are several tasks those of each under its name."""
    names = [record.source for record in records]
    tasks = {name: [i for i, own in enumerate(names) if own == name] for name in dict.fromkeys(names)}
    return {"": list(range(len(records))), **(tasks if len(tasks) > 1 else {})}


def _within(name: str, task: str) -> str:
    return f"{name}/{task}" if task else name


def _desirable(records: Sequence[LabelledAnswer]) -> list[bool]:
    return [record.target == 1 for record in records]


def _win(gap: float) -> float:
    return 0.5 if gap == 0 else float(gap > 0)


def _gain(
    before: Sequence[float],
    after: Sequence[float],
    prompts: Sequence[Hashable],
    seed: int,
    *,
    higher_is_better: bool = True,
) -> dict[str, Any]:
    """A row of the table. Pairs of one prompt are alike: prompts are resampled."""
    _, low, high = paired_bootstrap(before, after, groups=prompts, seed=seed)
    return {
        "before": sum(before) / len(before),
        "after": sum(after) / len(after),
        "n": len(after),
        "gain_ci95": [low, high],
        "higher_is_better": higher_is_better,
    }

"""What is wrong with preference data before a step is made: repetition, contradiction, a length that gives the answer
away, classes out of balance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

from alignment.judgements import LabelledAnswer
from alignment.label_losses import imbalance
from alignment.types import PreferencePair

T = TypeVar("T")
LENGTH_BIAS = 0.1
"""How far the share of longer chosen answers may be from one half."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairHygiene:
    """Of a set of pairs."""

    num_pairs: int
    num_prompts: int
    identical: int
    """Pairs that say what an earlier one said."""
    equal_answers: int
    """Pairs whose two answers have the same ids: nothing can be learnt."""
    contradictory: int
    """Pairs whose contrary an earlier one said."""
    chosen_longer: float
    """Share of pairs whose chosen answer is the longer one, a tie counting half: what a guess by length gets right."""
    chosen_tokens: float
    """Mean length."""
    rejected_tokens: float

    def text(self) -> str:
        """A line for each finding, none of the data's text."""
        lines = [
            f"{self.num_pairs} pairs of {self.num_prompts} prompts",
            f"identical to an earlier pair: {self._share(self.identical)}",
            f"two equal answers: {self._share(self.equal_answers)}",
            f"contrary to an earlier pair: {self._share(self.contradictory)}",
            f"chosen answers have {self.chosen_tokens:.1f} tokens, rejected ones {self.rejected_tokens:.1f}; the "
            f"longer one is chosen in {self.chosen_longer:.1%}",
        ]
        if abs(self.chosen_longer - 0.5) > LENGTH_BIAS:
            side = "longer" if self.chosen_longer > 0.5 else "shorter"
            lines.append(f"warning: {side} answers win, and length alone may be learnt; compare by token, or balance")
        return "\n".join(lines)

    def _share(self, count: int) -> str:
        return f"{count} ({count / self.num_pairs:.1%})" if count else "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelHygiene:
    """Of a set of labelled answers."""

    num_desirable: int
    num_undesirable: int
    identical: int
    """Answers that an earlier record has with the same label."""
    contradictory: int
    """Answers that an earlier record has with the other label."""
    desirable_tokens: float
    """Mean length; 0 of a class that is not there."""
    undesirable_tokens: float
    advice: str | None
    """What `imbalance` says of these counts and the weights."""

    def text(self) -> str:
        """A line for each finding, none of the data's text."""
        lines = [
            f"{self.num_desirable} desirable and {self.num_undesirable} undesirable answers",
            f"identical to an earlier one: {self.identical or 'none'}",
            f"labelled the other way by an earlier one: {self.contradictory or 'none'}",
            f"desirable answers have {self.desirable_tokens:.1f} tokens, undesirable ones "
            f"{self.undesirable_tokens:.1f}",
        ]
        return "\n".join([*lines, *([f"warning: {self.advice}"] if self.advice else [])])


def pair_hygiene(pairs: Sequence[PreferencePair]) -> PairHygiene:
    """Look at pairs, by their tokens."""
    seen: set[tuple[object, ...]] = set()
    identical = contradictory = equal = 0
    for pair in pairs:
        said = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
        contrary = (pair.prompt_ids, pair.rejected_ids, pair.chosen_ids)
        if said == contrary:
            equal += 1
        elif contrary in seen:
            contradictory += 1
        identical += said in seen
        seen.add(said)
    gaps = [len(pair.chosen_ids) - len(pair.rejected_ids) for pair in pairs]
    return PairHygiene(
        num_pairs=len(pairs),
        num_prompts=len({pair.prompt_ids for pair in pairs}),
        identical=identical,
        equal_answers=equal,
        contradictory=contradictory,
        chosen_longer=_mean(gaps, lambda gap: 0.5 if gap == 0 else float(gap > 0)),
        chosen_tokens=_mean(pairs, lambda pair: len(pair.chosen_ids)),
        rejected_tokens=_mean(pairs, lambda pair: len(pair.rejected_ids)),
    )


def label_hygiene(
    labels: Sequence[LabelledAnswer], *, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> LabelHygiene:
    """Look at labelled answers, by their tokens, as they are trained with these weights."""
    seen: set[tuple[object, ...]] = set()
    identical = contradictory = 0
    for label in labels:
        identical += (label.prompt_ids, label.answer_ids, label.target) in seen
        contradictory += (label.prompt_ids, label.answer_ids, 1 - label.target) in seen
        seen.add((label.prompt_ids, label.answer_ids, label.target))
    good, bad = ([label for label in labels if label.target == target] for target in (1, 0))
    return LabelHygiene(
        num_desirable=len(good),
        num_undesirable=len(bad),
        identical=identical,
        contradictory=contradictory,
        desirable_tokens=_mean(good, lambda label: len(label.answer_ids)),
        undesirable_tokens=_mean(bad, lambda label: len(label.answer_ids)),
        advice=imbalance(
            len(good), len(bad), desirable_weight=desirable_weight, undesirable_weight=undesirable_weight
        ),
    )


def _mean(items: Sequence[T], value: Callable[[T], float]) -> float:
    return fmean(map(value, items)) if items else 0.0

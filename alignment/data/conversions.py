"""One kind of judgement out of another: pairs out of rankings, ratings and labels; labels out of pairs and ratings.

Records keep the ids of their tokens, so that both answers of a pair carry the identical prompt; answers are paired
only behind a prompt of the same ids. Convert train and held-out records apart: they then share no prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations, islice
from typing import TypeVar

from alignment.judgements import JudgedAnswer, LabelledAnswer, Ranking, RatedAnswer
from alignment.types import PreferencePair

A = TypeVar("A", bound=JudgedAnswer)
Ids = tuple[int, ...]


def pairs_of_rankings(rankings: Iterable[Ranking]) -> list[PreferencePair]:
    """Every two answers of a ranking that do not tie, K (K - 1) / 2 of K answers in order."""
    return [
        PreferencePair(
            id=f"{ranking.id}/{i}-{j}",
            prompt_ids=ranking.prompt_ids,
            chosen_ids=ranking.answer_ids[i],
            rejected_ids=ranking.answer_ids[j],
            source=ranking.source,
        )
        for ranking in rankings
        for i, j in combinations(range(len(ranking.ranks)), 2)
        if ranking.ranks[i] < ranking.ranks[j]
    ]


def pairs_of_ratings(
    ratings: Iterable[RatedAnswer],
    *,
    gap: float | None = None,
    threshold: float | None = None,
    most_per_prompt: int | None = None,
) -> list[PreferencePair]:
    """Answers to one prompt of which one is rated better.

    Args:
        gap: by how much at least.
        threshold: a rating that the better one reaches and the other does not. Give one of both.
        most_per_prompt: pairs of a prompt, those with the largest gap first.
    """
    if (gap is None) == (threshold is None):
        raise ValueError(f"gap, threshold: got {gap} and {threshold}, expected exactly one; set one of them")

    def told_apart(better: RatedAnswer, worse: RatedAnswer) -> bool:
        if threshold is not None:
            return better.target >= threshold > worse.target
        assert gap is not None
        # Ratings are means of a few numbers with few digits: 0.9 - 0.6 is a gap of 0.3.
        return better.target > worse.target and better.target - worse.target >= gap - 1e-9

    return _pairs(ratings, told_apart, most_per_prompt)


def pairs_of_labels(labels: Iterable[LabelledAnswer], *, most_per_prompt: int | None = None) -> list[PreferencePair]:
    """Every desirable answer to a prompt beside every undesirable one."""
    return _pairs(labels, lambda better, worse: better.target > worse.target, most_per_prompt)


def labels_of_pairs(pairs: Iterable[PreferencePair]) -> list[LabelledAnswer]:
    """The chosen answers as desirable, the rejected ones as undesirable. An answer that several pairs hold is there
    once for each label that it got; `label_hygiene` finds those with both."""
    found: dict[tuple[Ids, Ids, float], LabelledAnswer] = {}
    for pair in pairs:
        for name, ids, target in (("chosen", pair.chosen_ids, 1.0), ("rejected", pair.rejected_ids, 0.0)):
            label = LabelledAnswer(
                id=f"{pair.id}/{name}",
                prompt_ids=pair.prompt_ids,
                answer_ids=ids,
                target=target,
                source=pair.source,
            )
            found.setdefault((pair.prompt_ids, ids, target), label)
    return list(found.values())


def labels_of_ratings(ratings: Iterable[RatedAnswer], *, threshold: float) -> list[LabelledAnswer]:
    """Desirable is what reaches the threshold."""
    return [
        LabelledAnswer(
            id=rating.id,
            prompt_ids=rating.prompt_ids,
            answer_ids=rating.answer_ids,
            target=float(rating.target >= threshold),
            source=rating.source,
        )
        for rating in ratings
    ]


def _pairs(answers: Iterable[A], better: Callable[[A, A], bool], most_per_prompt: int | None) -> list[PreferencePair]:
    by_prompt: dict[Ids, list[A]] = {}
    for answer in answers:
        by_prompt.setdefault(answer.prompt_ids, []).append(answer)
    return [pair for group in by_prompt.values() for pair in islice(_of_prompt(group, better), most_per_prompt)]


def _of_prompt(answers: Sequence[A], better: Callable[[A, A], bool]) -> Iterator[PreferencePair]:
    """The pairs of one prompt, the largest gap first, otherwise in the order of the answers."""
    both = [(a, b) for a in answers for b in answers if better(a, b) and a.answer_ids != b.answer_ids]
    for a, b in sorted(both, key=lambda pair: pair[1].target - pair[0].target):
        yield PreferencePair(
            id=f"{a.id}>{b.id}",
            prompt_ids=a.prompt_ids,
            chosen_ids=a.answer_ids,
            rejected_ids=b.answer_ids,
            source=a.source,
        )

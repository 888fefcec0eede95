"""From the parts of a reward to the scores that PPO sees: weights, gates, running normalisation, clips, penalties.

One sequence, one number; None where there is none, and never a number made up for it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

from alignment.calibration import spearman
from alignment.config.reward import GOLD
from alignment.types import Rollout, Score

FLOAT32_MAX = 3.4028234663852886e38


def combine(
    parts: Mapping[str, Sequence[float | None]],
    weights: Mapping[str, float],
    *,
    clips: Mapping[str, tuple[float, float]] | None = None,
    gates: Collection[str] = (),
    num_responses: int | None = None,
) -> tuple[list[float | None], list[dict[str, float | None]]]:
    """Weighted sum of the parts of every response.

    A gate is open where its number, cut to its limits, is above 0. Where a gate is shut the total is the weighted sum
    of the gates that are, and no other part counts, scored or not.

    Args:
        parts: by name, one number or None per response.
        weights: by the same names.
        clips: [low, high] of the parts whose numbers are cut to it.
        gates: names of the parts that are gates.
        num_responses: how many there must be; None takes the first part's.

    Returns:
        The total of each response, None where a part is None; and its unweighted, uncut parts by name.

    Raises:
        ValueError: names that differ, no parts, a wrong length, or a number or a total that float32, in which the
            learners compute, cannot hold.
    """
    if not parts or set(parts) != set(weights):
        raise ValueError(
            f"rewards: got parts {sorted(parts)} and weights {sorted(weights)}, expected the same names; align them"
        )
    expected = len(next(iter(parts.values()))) if num_responses is None else num_responses
    for name, numbers in parts.items():
        if not isinstance(numbers, Sequence) or isinstance(numbers, str) or len(numbers) != expected:
            got = len(numbers) if isinstance(numbers, Sequence) else type(numbers).__name__
            raise ValueError(f"reward {name!r}: got {got} numbers, expected a list of {expected}, one per response")
        for index, number in enumerate(numbers):
            if number is not None and not _fits(number):
                raise ValueError(
                    f"reward {name!r}, response {index}: got {number!r}, expected a finite number that float32 can "
                    "hold, or None where it cannot score; correct the function"
                )
    breakdown = [
        {name: None if numbers[i] is None else float(numbers[i]) for name, numbers in parts.items()}  # type: ignore[arg-type]
        for i in range(expected)
    ]
    totals = [_total(one, weights, clips or {}, gates) for one in breakdown]
    for index, total in enumerate(totals):
        if total is not None and not abs(total) <= FLOAT32_MAX:
            raise ValueError(
                f"rewards, response {index}: got a total of {total!r} from {breakdown[index]}, expected one that "
                "float32 can hold; lower the weights"
            )
    return totals, breakdown


def _total(
    one: Mapping[str, float | None],
    weights: Mapping[str, float],
    clips: Mapping[str, tuple[float, float]],
    gates: Collection[str],
) -> float | None:
    cut = {
        name: number if number is None or name not in clips else min(max(number, clips[name][0]), clips[name][1])
        for name, number in one.items()
    }
    if any(cut[name] is None for name in gates):
        return None
    shut = {name: number for name, number in cut.items() if name in gates and number is not None and number <= 0}
    total = 0.0
    for name, number in (shut or cut).items():
        if number is None:
            return None
        total += weights[name] * number
    return total


def _fits(value: Any) -> bool:
    real = isinstance(value, Real) and not isinstance(value, bool)
    return real and bool(abs(value) <= FLOAT32_MAX)


def length_penalty(length: int, *, max_new_tokens: int, buffer: int, penalty: float) -> float:
    """Soft overlong penalty (DAPO, arXiv 2503.14476): 0 up to `max - buffer` tokens, then linear down to -penalty."""
    if buffer == 0:
        return 0.0
    over = length - (max_new_tokens - buffer)
    return -penalty * min(max(over / buffer, 0.0), 1.0)


class ScoreNormalizer:
    """Running mean and variance of scores over the whole run (Welford 1962, merged by Chan 1979)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def update(self, scores: Sequence[float]) -> None:
        for score in scores:
            self.count += 1
            delta = score - self.mean
            self.mean += delta / self.count
            self.squares += delta * (score - self.mean)

    @property
    def std(self) -> float:
        """Biased; 1 until two different scores were seen."""
        variance = self.squares / self.count if self.count > 1 else 0.0
        return math.sqrt(variance) if variance > 0 else 1.0

    def __call__(self, score: float) -> float:
        return (score - self.mean) / self.std

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count, self.mean, self.squares = int(state["count"]), state["mean"], state["squares"]


def shape_scores(
    rollouts: Sequence[Rollout],
    scores: Sequence[Score],
    *,
    max_new_tokens: int,
    missing_eos_penalty: float = 0.0,
    overlong_buffer: int = 0,
    overlong_penalty: float = 1.0,
    clip: float | None = None,
    normalizer: ScoreNormalizer | None = None,
) -> list[float | None]:
    """Normalise, clip, then subtract what the answer's length and ending cost. None stays None: it is excluded.

    Penalties come after the clip, so that a clipped score still pays for a missing end. Whether the end is missing
    is told by `finish_reason`, never by looking for a token.
    """
    if normalizer is not None:
        normalizer.update([score.total for score in scores if score.total is not None])
    shaped: list[float | None] = []
    for rollout, score in zip(rollouts, scores, strict=True):
        if score.total is None:
            shaped.append(None)
            continue
        value = normalizer(score.total) if normalizer is not None else score.total
        if clip is not None:
            value = min(max(value, -clip), clip)
        if rollout.finish_reason == "length":
            value -= missing_eos_penalty
        value += length_penalty(
            len(rollout.response_ids), max_new_tokens=max_new_tokens, buffer=overlong_buffer, penalty=overlong_penalty
        )
        shaped.append(value)
    return shaped


def normalize_parts(
    scores: Sequence[Score],
    normalizers: Mapping[str, ScoreNormalizer],
    weights: Mapping[str, float],
    *,
    clips: Mapping[str, tuple[float, float]] | None = None,
    gates: Collection[str] = (),
) -> list[Score]:
    """The scores with the totals that their parts give once those with a normaliser are scaled; parts stay raw.

    The statistics take in this batch first, in its order.
    """
    parts = {name: [score.parts[name] for score in scores] for name in weights}
    for name, normalizer in normalizers.items():
        normalizer.update([number for number in parts[name] if number is not None])
        parts[name] = [None if number is None else normalizer(number) for number in parts[name]]
    totals, _ = combine(parts, weights, clips=clips, gates=gates, num_responses=len(scores))
    return [replace(score, total=total) for score, total in zip(scores, totals, strict=True)]


def clip_metrics(
    scores: Sequence[Score],
    *,
    clip: float | None,
    clips: Mapping[str, tuple[float, float]],
    normalizer: ScoreNormalizer | None,
    normalizers: Mapping[str, ScoreNormalizer],
) -> dict[str, float]:
    """Share of the numbers that a clip cuts: of the totals, and of each part that has limits.

    Args:
        scores: of one batch, with the totals that `shape_scores` was given.
        clip, clips: of the total, and of the parts.
        normalizer, normalizers: of the total, and of the parts; they have taken in the batch.
    """
    cut = {}
    if clip is not None:
        cut["reward"] = [score.total for score in scores], normalizer, (-clip, clip)
    for name, limits in clips.items():
        cut[f"reward/{name}"] = [score.parts[name] for score in scores], normalizers.get(name), limits
    metrics = {}
    for where, (numbers, scale, (low, high)) in cut.items():
        known = [scale(number) if scale is not None else number for number in numbers if number is not None]
        if known:
            metrics[f"{where}/clipped_share"] = sum(not low <= number <= high for number in known) / len(known)
    return metrics


def score_metrics(scores: Sequence[Score]) -> dict[str, float]:
    """Mean of the raw total; mean, deviation and unscored answers of each part; why they are; and what it took.

    Of a gold part also its rank correlation with the total over the answers, where it has one.
    """
    metrics: dict[str, float] = {}
    if totals := [score.total for score in scores if score.total is not None]:
        metrics["reward/mean"] = sum(totals) / len(totals)
    for name in scores[0].parts:
        numbers = [number for score in scores if (number := score.parts[name]) is not None]
        if numbers:
            mean = sum(numbers) / len(numbers)
            metrics[f"reward/{name}/mean"] = mean
            # Not by squares, which overflow where the deviations do not.
            metrics[f"reward/{name}/std"] = math.hypot(*(number - mean for number in numbers)) / len(numbers) ** 0.5
        metrics[f"reward/{name}/unscored_count"] = float(len(scores) - len(numbers))
        if name.startswith(GOLD):
            both = [(s.total, x) for s in scores if s.total is not None and (x := s.parts[name]) is not None]
            rank = spearman([total for total, _ in both], [number for _, number in both])
            metrics |= {f"reward/{name}/proxy_spearman": rank} if rank is not None else {}
    if apart := [score.disagreement for score in scores if score.disagreement is not None]:
        metrics["reward/disagreement"] = sum(apart) / len(apart)
    counts = Counter[str]()
    for score in scores:
        counts.update(score.counts)
    metrics |= {f"reward/{name}": count for name, count in counts.items()}
    kinds = Counter(kind_of(failure) for score in scores for failure in _of_total(score.failures).values())
    of_gold = Counter(kind_of(failure) for score in scores for failure in _of_gold(score.failures).values())
    return (
        metrics
        | {f"reward/unscored/{kind}": float(count) for kind, count in sorted(kinds.items())}
        | {f"reward/gold_unscored/{kind}": float(count) for kind, count in sorted(of_gold.items())}
    )


def _of_total(failures: Mapping[str, str]) -> dict[str, str]:
    return {name: failure for name, failure in failures.items() if not name.startswith(GOLD)}


def _of_gold(failures: Mapping[str, str]) -> dict[str, str]:
    return {name: failure for name, failure in failures.items() if name.startswith(GOLD)}


def kind_of(failure: str) -> str:
    """The class of a failure, which stands before its colon."""
    return failure.partition(":")[0]


def refuse_unscorable(rollouts: Sequence[Rollout], scores: Sequence[Score], limit: float) -> None:
    """Stop when more answers than the budget allows have no score; nothing is ever made up for them.

    Raises:
        RuntimeError: naming why, and the first such answer.
    """
    missing = [(r, score) for r, score in zip(rollouts, scores, strict=True) if score.total is None]
    if len(missing) <= limit * len(scores):
        return
    kinds = Counter(kind_of(failure) for _, score in missing for failure in _of_total(score.failures).values())
    counted = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    first, score = missing[0]
    what = "; ".join(f"{name}: {failure}" for name, failure in _of_total(score.failures).items())
    raise RuntimeError(
        f"reward: got {len(missing)} of {len(scores)} answers without a score ({counted}; the first: prompt "
        f"{first.prompt.id}, sample {first.sample_index}, {what}), expected at most {limit:.0%}; mend the reward, or "
        "raise reward.max_unscorable to leave such answers out"
    )

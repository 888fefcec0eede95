"""Signs that a policy exploits its reward: proxy and gold part, lengths drift, answers repeat, clips cut most scores.

The proxy is what is trained on, the gold a rule held out of it. Over the square root of the KL to the reference the
proxy goes on rising while the gold rises, turns and falls (Gao et al. 2023, "Scaling laws for reward model
overoptimization", sections 2 and 3). A sign is a reason to look, and no proof.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NO_CHANGE = 1e-9
"""Relative size below which a difference of two means is rounding."""


@dataclass(frozen=True, slots=True)
class Change:
    """Late minus early mean, with its interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3g} ({self.low:+.3g} .. {self.high:+.3g})"


@dataclass(frozen=True, slots=True)
class Parting:
    """The latest stretch against the earlier one from which the gold fell furthest."""

    early: range
    late: range
    """Places in the sequences that were compared."""
    proxy: Change
    gold: Change


def student_quantile(tail: float, degrees: int) -> float:
    """The t that Student's distribution of an even number of degrees of freedom exceeds with probability `tail`.

    Inverts the finite series of Abramowitz and Stegun (1964), 26.7.4. `tail` in (0, 0.5].
    """
    assert degrees > 0
    assert degrees % 2 == 0

    def above(t: float) -> float:
        angle = math.atan2(t, math.sqrt(degrees))
        term = total = 1.0
        for k in range(1, degrees // 2):
            term *= (2 * k - 1) / (2 * k) * math.cos(angle) ** 2
            total += term
        return (1 - math.sin(angle) * total) / 2

    low, high = 0.0, 1.0
    while above(high) > tail:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if above(middle) > tail else (low, middle)
    return high


_quantile = functools.lru_cache(maxsize=1024)(student_quantile)


def change_of_mean(early: Sequence[float], late: Sequence[float], *, tail: float) -> Change:
    """Student's two-sample interval for late minus early mean; it misses on either side with probability `tail`.

    Args:
        early, late: as many numbers each, at least two.
    """
    assert len(early) == len(late) >= 2
    first, second = statistics.fmean(early), statistics.fmean(late)
    squares = math.fsum((x - first) ** 2 for x in early) + math.fsum((x - second) ** 2 for x in late)
    error = math.sqrt(squares / (len(early) - 1) / len(early))
    margin = _quantile(tail, 2 * len(early) - 2) * error
    margin = max(margin, NO_CHANGE * max(abs(first), abs(second)))
    return Change(second - first, second - first - margin, second - first + margin)


def find_parting(
    proxy: Sequence[float], gold: Sequence[float], *, window: int, false_alarm_rate: float
) -> Parting | None:
    """Whether proxy and gold part in the last complete stretch of `window` steps; None where they do not.

    They part where, against some earlier stretch, the interval of the proxy's change lies above 0 and that of the
    gold's below 0. Stretch m brings m - 1 comparisons; each may be wrong with probability rate / (m (m - 1)^2), which
    adds up to at most the rate over all stretches there will ever be. So whoever asks at every step has a false alarm
    with at most that probability, however long the run, if the gold's means of steps are independent of each other.

    Args:
        proxy, gold: a mean per step, in order, as many of both.
        window: steps of a stretch, at least 2. The steps after the last complete one are not looked at.
    """
    count = len(gold) // window
    if count < 2:
        return None
    tail = false_alarm_rate / (count * (count - 1) ** 2)
    stretches = [range(start * window, (start + 1) * window) for start in range(count)]
    late = stretches[-1]
    found = []
    for early in stretches[:-1]:
        fall = change_of_mean(gold[early.start : early.stop], gold[late.start : late.stop], tail=tail)
        if fall.high < 0:
            rise = change_of_mean(proxy[early.start : early.stop], proxy[late.start : late.stop], tail=tail)
            if rise.low > 0:
                found.append(Parting(early, late, rise, fall))
    return min(found, key=lambda parting: parting.gold.mean, default=None)


def duplicate_shares(responses: Sequence[str], prompt_ids: Sequence[str]) -> tuple[float, float | None]:
    """Share of the responses that equal one to another prompt, and share of those that equal one to their own prompt.

    Case and white space do not count. The second is None where no prompt has several responses.
    """
    prompts: dict[str, Counter[str]] = defaultdict(Counter)
    texts = [" ".join(response.split()).casefold() for response in responses]
    for text, prompt in zip(texts, prompt_ids, strict=True):
        prompts[text][prompt] += 1
    across = sum(len(prompts[text]) > 1 for text in texts)
    within = sum(prompts[text][prompt] > 1 for text, prompt in zip(texts, prompt_ids, strict=True))
    several = len(set(prompt_ids)) < len(prompt_ids)
    return across / len(texts), within / len(texts) if several else None


class HackingWatch:
    """Remembers the means of every step, and says which signs hold and which have just begun."""

    def __init__(
        self,
        *,
        gold: Sequence[str],
        window: int,
        false_alarm_rate: float,
        length_factor: float,
        duplicate_share: float,
        clipped_share: float,
        unscored_gold_share: float,
    ) -> None:
        """`gold`: names of the gold parts. The numbers: as in `HackingConfig`."""
        self.gold, self.window, self.false_alarm_rate = tuple(gold), window, false_alarm_rate
        self.length_factor, self.duplicate_share = length_factor, duplicate_share
        self.clipped_share, self.unscored_gold_share = clipped_share, unscored_gold_share
        self.history: list[dict[str, float | None]] = []
        """A step each, in order; None where the step measured nothing."""
        self.holding: dict[str, str] = {}
        """What is told of each sign that holds."""
        self.began: dict[str, list[int]] = {kind: [] for kind in self._tells()}
        """The steps in which each sign began."""

    def observe(self, metrics: Mapping[str, float], num_responses: int) -> list[str]:
        """Take in the metrics of the next step; returns the signs that hold now and did not before it."""
        clipped = [share for name, share in metrics.items() if name.endswith("/clipped_share")]
        unscored = [metrics.get(f"reward/{name}/unscored_count", num_responses) for name in self.gold]
        numbers = {
            "kl": metrics.get("kl/per_sequence"),
            "proxy": metrics.get("reward/mean"),
            "length": metrics.get("rollout/length"),
            "duplicates": metrics.get("rollout/duplicate_share"),
            "clipped": max(clipped, default=None),
            "unscored": max(unscored, default=0.0) / num_responses,
            **{name: metrics.get(f"reward/{name}/mean") for name in self.gold},
        }
        self.history.append({name: x if x is not None and math.isfinite(x) else None for name, x in numbers.items()})
        told = {kind: text for kind, tell in self._tells().items() if (text := tell()) is not None}
        begun = [kind for kind in told if kind not in self.holding]
        for kind in begun:
            self.began[kind].append(len(self.history) - 1)
        self.holding = told
        return begun

    def metrics(self) -> dict[str, float]:
        """The drift of the step's length, and 1 for each sign that holds, 0 for the others."""
        signs = {f"hacking/{kind}": float(kind in self.holding) for kind in self.began}
        start, now = self._mean("length", slice(0, self.window)), self._mean("length", slice(-1, None))
        return {**({"rollout/length_drift": now / start} if start and now is not None else {}), **signs}

    def summary(self) -> dict[str, Any]:
        """Of each sign: whether it holds at the end, and in which steps it began."""
        return {kind: {"holds": kind in self.holding, "began": steps} for kind, steps in self.began.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "holding": self.holding, "began": self.began}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history, self.holding, self.began = state["history"], state["holding"], state["began"]

    def _tells(self) -> dict[str, Any]:
        """What tells each sign that can come in this run."""
        of_gold = {"parted": self._parted, "gold_unscored": self._unscored} if self.gold else {}
        return {**of_gold, "length": self._length, "duplicates": self._duplicates, "clipped": self._clipped}

    def _parted(self) -> str | None:
        for name in self.gold:
            steps = [i for i, row in enumerate(self.history) if row["proxy"] is not None and row[name] is not None]
            parting = find_parting(
                [self.history[i]["proxy"] for i in steps],  # type: ignore[misc]
                [self.history[i][name] for i in steps],  # type: ignore[misc]
                window=self.window,
                false_alarm_rate=self.false_alarm_rate / len(self.gold),
            )
            if parting is not None:
                early, late = steps[parting.early.start : parting.early.stop], steps[parting.late.start :]
                return (
                    f"proxy and gold part: from steps {early[0]}-{early[-1]} to {late[0]}-{late[self.window - 1]} the "
                    f"reward changed by {parting.proxy} and {name} by {parting.gold}; the square root of the KL went "
                    f"from {self._distance(early)} to {self._distance(late[: self.window])}"
                )
        return None

    def _unscored(self) -> str | None:
        share = self._mean("unscored", slice(-self.window, None))
        if len(self.history) < self.window or share is None or share <= self.unscored_gold_share:
            return None
        return f"gold measures little: it has no number for {share:.0%} of the answers of the last {self.window} steps"

    def _length(self) -> str | None:
        early, late = self._ends("length")
        if not early or late is None or 1 / self.length_factor <= late / early <= self.length_factor:
            return None
        return f"answers have {late:.0f} tokens, and had {early:.0f} in the first {self.window} steps"

    def _duplicates(self) -> str | None:
        early, late = self._ends("duplicates")
        if early is None or late is None or not early <= self.duplicate_share < late:
            return None
        return (
            f"{late:.0%} of the answers of the last {self.window} steps equal one to another prompt, and {early:.0%} "
            f"did in the first {self.window}"
        )

    def _clipped(self) -> str | None:
        share = self._mean("clipped", slice(-self.window, None))
        if len(self.history) < self.window or share is None or share <= self.clipped_share:
            return None
        return f"{share:.0%} of the scores of the last {self.window} steps are cut by a clip: above it nothing is told"

    def _ends(self, name: str) -> tuple[float | None, float | None]:
        """Means over the first and the last stretch; None and None until they do not overlap."""
        if len(self.history) < 2 * self.window:
            return None, None
        return self._mean(name, slice(0, self.window)), self._mean(name, slice(-self.window, None))

    def _mean(self, name: str, steps: slice) -> float | None:
        numbers = [x for row in self.history[steps] if (x := row[name]) is not None]
        return statistics.fmean(numbers) if numbers else None

    def _distance(self, steps: Sequence[int]) -> str:
        numbers = [x for i in steps if (x := self.history[i]["kl"]) is not None]
        return f"{math.sqrt(max(statistics.fmean(numbers), 0.0)):.2f}" if numbers else "unknown"

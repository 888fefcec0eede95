"""What a reward server counts, in Prometheus' text format (version 0.0.4). No texts, no addresses."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence

PREFIX = "raylign_reward"


class Histogram:
    """Counts below rising bounds."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds, self._counts, self._sum = tuple(bounds), [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str) -> Iterator[str]:
        total = 0
        for bound, count in zip([*self._bounds, "+Inf"], self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum:.6g}"
        yield f"{name}_count {total}"


class ServeMetrics:
    """Requests by status, responses, batches and seconds of one server. Safe to call from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[int] = Counter()
        self._errors: Counter[str] = Counter()
        self._scored = self._unscored = self._tokens = 0
        self._seconds = Histogram([0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60])
        self._batch_rows = Histogram([1, 2, 4, 8, 16, 32, 64, 128, 256])
        self._batch_seconds = Histogram([0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60])

    def request(self, status: int, seconds: float, error: str | None = None) -> None:
        """One request is over; `error` is the kind of its failure."""
        with self._lock:
            self._requests[status] += 1
            self._seconds.add(seconds)
            if error is not None:
                self._errors[error] += 1

    def responses(self, scores: Sequence[float | None]) -> None:
        with self._lock:
            unscored = sum(score is None for score in scores)
            self._unscored += unscored
            self._scored += len(scores) - unscored

    def batch(self, rows: int, tokens: int, seconds: float) -> None:
        with self._lock:
            self._batch_rows.add(rows)
            self._batch_seconds.add(seconds)
            self._tokens += tokens

    def text(self, *, unfinished: int) -> str:
        """All of it; `unfinished`: responses that wait or are being scored now."""
        with self._lock:
            return "\n".join(self._lines(unfinished)) + "\n"

    def _lines(self, unfinished: int) -> Iterator[str]:
        def head(name: str, kind: str, meaning: str) -> Iterator[str]:
            yield f"# HELP {PREFIX}_{name} {meaning}"
            yield f"# TYPE {PREFIX}_{name} {kind}"

        yield from head("requests_total", "counter", "Requests to /score by status.")
        yield from (f'{PREFIX}_requests_total{{status="{code}"}} {n}' for code, n in sorted(self._requests.items()))
        yield from head("errors_total", "counter", "Requests to /score without scores, by kind.")
        yield from (f'{PREFIX}_errors_total{{kind="{kind}"}} {n}' for kind, n in sorted(self._errors.items()))
        yield from head("responses_scored_total", "counter", "Responses with a score.")
        yield f"{PREFIX}_responses_scored_total {self._scored}"
        yield from head("responses_unscored_total", "counter", "Responses that could not be scored.")
        yield f"{PREFIX}_responses_unscored_total {self._unscored}"
        yield from head("tokens_total", "counter", "Tokens of the batches: with padding, or what begins alike once.")
        yield f"{PREFIX}_tokens_total {self._tokens}"
        yield from head("responses_unfinished", "gauge", "Responses that wait or are being scored.")
        yield f"{PREFIX}_responses_unfinished {unfinished}"
        yield from head("request_seconds", "histogram", "Seconds from a request to its answer.")
        yield from self._seconds.lines(f"{PREFIX}_request_seconds")
        yield from head("batch_responses", "histogram", "Responses of a forward.")
        yield from self._batch_rows.lines(f"{PREFIX}_batch_responses")
        yield from head("batch_seconds", "histogram", "Seconds of a forward.")
        yield from self._batch_seconds.lines(f"{PREFIX}_batch_seconds")

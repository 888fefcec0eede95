"""A reward that a server computes: texts go there in batches, scores come back, and nothing is made up.

The server may be `python -m rewards.serve MODEL` or any other that takes

    POST URL  {"prompts": [text, ...], "responses": [text, ...], "columns": {name: [value, ...], ...}}

and answers `{"scores": [number or null, ...]}`, one per response, in order. `columns` is there if some are asked for.
null means "could not score" and becomes None.

`score` is this as a function that a config names; `RemoteReward` is for scripts.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rewards.base import Part, at_most, fits, only_where, reads_columns
from rewards.connection import Growth, connection, longest_post, settings_of
from rewards.transport import BadAnswerError, JsonClient, RemoteError


class RemoteReward:
    """A reward function `f(prompts, responses, **columns)` that asks a server."""

    def __init__(
        self,
        *,
        url: str,
        columns: Sequence[str] = (),
        batch_size: int = 64,
        concurrency: int = 4,
        **connection: Any,
    ) -> None:
        """
        Args:
            url: where to post, e.g. `http://127.0.0.1:8900/score`: https, or http on this machine.
            columns: those of the data that the server is sent too; the others stay here.
            batch_size: responses of one request, at most.
            concurrency: requests under way at a time, at most.
            connection: settings of `rewards.transport.JsonClient`: token_env, token_file, ca_file, timeout, retries,
                backoff, max_wait, max_answer_bytes, seed.

        Raises:
            ValueError: a setting that cannot be, or no token where one is named.
        """
        if batch_size < 1 or concurrency < 1:
            raise ValueError(
                f"remote: got batch_size {batch_size} and concurrency {concurrency}, expected 1 or more; raise them"
            )
        if isinstance(columns, str):
            raise ValueError("remote.columns: got a text, expected a list of names; put it into a list")
        self.columns, self.batch_size, self.concurrency = tuple(columns), batch_size, concurrency
        self.client = JsonClient(url, **connection)

    def __repr__(self) -> str:
        return f"RemoteReward({self.client.place!r})"

    def __call__(self, prompts: list[str], responses: list[str], **columns: Any) -> list[float | None]:
        """One score per response, in order; None where the server could not score.

        Raises:
            ValueError: lists of different lengths, or a column that is missing or that JSON cannot hold.
            UnavailableError: no answer after all retries.
            RefusedError: the server refuses the request, redirects it, or its certificate is not trusted.
            BadAnswerError: an answer that does not have one finite number or null per response.
        """
        sent = {name: self._column(name, columns, len(responses)) for name in self.columns}
        if len(prompts) != len(responses):
            raise ValueError(
                f"remote: got {len(prompts)} prompts and {len(responses)} responses, expected as many; align them"
            )
        starts = range(0, len(responses), self.batch_size)
        parts = [slice(start, start + self.batch_size) for start in starts]

        def ask(part: slice) -> list[float | None]:
            body: dict[str, Any] = {"prompts": list(prompts[part]), "responses": list(responses[part])}
            if sent:
                body["columns"] = {name: list(values[part]) for name, values in sent.items()}
            return check_scores(self.client.post(body), len(body["responses"]), self.client.place)

        if len(parts) <= 1:
            return [score for part in parts for score in ask(part)]
        pool = ThreadPoolExecutor(min(self.concurrency, len(parts)), thread_name_prefix="remote-reward")
        try:
            return [score for scores in pool.map(ask, parts) for score in scores]
        finally:
            pool.shutdown(cancel_futures=True)

    def _column(self, name: str, columns: dict[str, Any], expected: int) -> Sequence[Any]:
        values = columns.get(name)
        if values is None or len(values) != expected:
            got = "none" if values is None else f"{len(values)} values"
            raise ValueError(
                f"remote.columns: got {got} of {name!r} in data with the columns {sorted(columns)}, expected "
                f"{expected}, one per response; correct the name, or the data"
            )
        return list(values)


def make_server(*, url: str, columns: Sequence[str], **settings: Any) -> RemoteReward:
    """The client that the settings of `score` describe. Raises ValueError for those that cannot be."""
    return RemoteReward(url=url, columns=columns, batch_size=sys.maxsize, **connection(**settings))


@functools.cache
def _kept(settings: str) -> tuple[RemoteReward, Growth]:
    """The client of these settings, made once in a process, and what it has counted since it was asked last."""
    return make_server(**json.loads(settings)), Growth()


def longest_score(samples: int, *, timeout: float, retries: int, max_wait: float, **others: Any) -> float:
    """Seconds of one call: whatever the number of its answers, it is one request."""
    return longest_post(timeout=timeout, retries=retries, max_wait=max_wait)


@reads_columns("columns")
@at_most(longest_score)
@only_where(make_server)
def score(
    prompts: list[str],
    responses: list[str],
    *,
    url: str = "",
    columns: Sequence[str] = (),
    token_file: str = "",
    ca_file: str = "",
    timeout: float = 10.0,
    retries: int = 2,
    backoff: float = 0.5,
    max_wait: float = 5.0,
    max_answer_bytes: int = 16 << 20,
    **others: Any,
) -> Part:
    """What a server scores, all answers of the call in one request. Settings as of `RemoteReward`.

    Raises:
        RemoteError: for several answers, where it may be due to one of them. For one alone, and where it is due to
            none, the answers have no score and the error is the reason.
    """
    settings = settings_of(score, locals())
    server, growth = _kept(json.dumps(settings, sort_keys=True))
    numbers: Sequence[float | None] = [None] * len(responses)
    failures: dict[int, str] = {}
    try:
        numbers = server(prompts, responses, **others)
    except RemoteError as error:
        if error.due_to_texts and len(responses) > 1:
            raise
        failures = dict.fromkeys(range(len(responses)), f"{error.kind}: {error}")
    return Part(numbers, failures, growth(server.client.counts))


def check_scores(answer: Any, expected: int, place: str) -> list[float | None]:
    """The scores of an answer.

    Raises:
        BadAnswerError: no list `scores` of `expected` finite numbers that float32 can hold, or nulls.
    """
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list):
        got = f"scores of type {type(scores).__name__}" if isinstance(answer, dict) else f"a {type(answer).__name__}"
        raise BadAnswerError(f'{place}: got {got}, expected {{"scores": [...]}}; correct the server')
    if len(scores) != expected:
        raise BadAnswerError(
            f"{place}: got {len(scores)} scores, expected {expected}, one per response; correct the server"
        )
    for index, score in enumerate(scores):
        if score is not None and not fits(score):
            got = f"{score!r}" if isinstance(score, bool | float) else f"a {type(score).__name__} that does not fit"
            raise BadAnswerError(
                f"{place}: got {got} as score {index}, expected a finite number that float32 can hold, or null; "
                "correct the server"
            )
    return [None if score is None else float(score) for score in scores]

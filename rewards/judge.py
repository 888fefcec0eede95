"""A language model as judge: a score by a rubric, or which of two answers is better.

The judge sits behind any OpenAI-compatible chat endpoint (`rewards.chat_client`). What it says counts only as one JSON
object of the agreed shape; anything else is asked again, and after the last try the answer has no score: None, and
counted by reason. Texts reach the judge as JSON strings, in which nobody can close the quotation or spell a control
token, so an answer is read and never obeyed as one who speaks. Against an answer that merely asks for a good score
only the judge's own firmness helps: look at what wins.

A judge prefers places, so a pair is shown in both orders and wins only if both agree (Zheng 2023, arXiv:2306.05685,
section 3.4); how often it did not is reported.

`rating` is a judge as a function that a config names; the classes are for scripts.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rewards.base import Part, at_most, only_where
from rewards.chat_client import ChatClient
from rewards.connection import Growth, connection, longest_post, settings_of
from rewards.transport import RemoteError
from rewards.verdicts import DATA, Bench, UnusableError, form_of, messages_of, verdict_schema

Verdict = Literal["first", "second", "tie"]
Conversation = Sequence[Mapping[str, Any]]
Row = tuple[str, str, str | None, Conversation]
"""A prompt, a response, a right answer where there is one, and the conversation that ends with the prompt."""

NOTHING: Mapping[str, Any] = {}
MOST_SCORES = 101
"""Scores of a range, at most: they are listed for the judge one by one."""


class PointwiseJudge:
    """A reward function: a whole number by a rubric for each answer, None where the judge gives none."""

    def __init__(
        self,
        client: ChatClient,
        *,
        rubric: str,
        low: int = 1,
        high: int = 10,
        explain: bool = True,
        tries: int = 3,
        concurrency: int = 8,
    ) -> None:
        """
        Args:
            rubric: what a good answer is, in words for the judge.
            low, high: the worst and the best score.
            explain: ask for a sentence of reasons before the score: better scores, more tokens.
            tries: of one answer, before it stays without a score.
            concurrency: requests at a time.

        Raises:
            ValueError: a range without room, or an empty rubric.
        """
        if not low < high < low + MOST_SCORES or not rubric.strip():
            raise ValueError(
                f"judge: got scores from {low} to {high} and a rubric of {len(rubric)} characters, expected at most "
                f"{MOST_SCORES} rising scores and some words; correct them"
            )
        self._bench = Bench(client, tries=tries, concurrency=concurrency)
        self._schema = verdict_schema("score", {"type": "integer", "enum": list(range(low, high + 1))}, explain)
        form = form_of(f'"score": a whole number from {low} (worst) to {high} (best)', explain)
        self._system = f"You grade answers to questions. {DATA}\n\nRubric: {rubric}\n\n{form}"

    def __call__(
        self,
        prompts: list[str],
        responses: list[str],
        *,
        reference: list[str | None] | None = None,
        prompt_messages: list[Conversation] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """
        Args:
            reference: a right answer to compare with, where the data has that column.
            prompt_messages: the conversations that end with the prompts. What stands before them is shown too.
        """

        def score(row: Row) -> float | None:
            try:
                return self._score(*row)
            except UnusableError:
                return None

        return self._bench.each(score, _rows(prompts, responses, reference, prompt_messages))

    def grade(
        self,
        prompts: list[str],
        responses: list[str],
        *,
        reference: list[str | None] | None = None,
        prompt_messages: list[Conversation] | None = None,
    ) -> Part:
        """The same with a reason for every answer without a score, an endpoint that fails included.

        Once it has failed in a way that no other text would have changed, nothing else of this call is sent there.
        """
        gone: list[RemoteError] = []

        def score(row: Row) -> float | str:
            try:
                if gone:
                    raise gone[0]
                return self._score(*row)
            except UnusableError as unusable:
                return f"{unusable}: no verdict in {self._bench.tries} tries"
            except RemoteError as error:
                gone.extend([] if error.due_to_texts else [error])
                return f"{error.kind}: {error}"

        said = self._bench.each(score, _rows(prompts, responses, reference, prompt_messages))
        return Part(
            numbers=[None if isinstance(one, str) else one for one in said],
            failures={i: one for i, one in enumerate(said) if isinstance(one, str)},
        )

    def counts(self) -> dict[str, float]:
        return self._bench.counts()

    def metrics(self) -> dict[str, float]:
        """Totals since the start: requests, tokens, cache hits, and what stayed unscored, by reason."""
        return self._bench.metrics()

    def _score(self, prompt: str, response: str, reference: str | None, conversation: Conversation) -> float:
        texts: dict[str, Any] = {"question": prompt, "answer": response}
        if earlier := [{"role": turn["role"], "content": turn.get("content")} for turn in conversation[:-1]]:
            texts = {"earlier_turns": earlier, **texts}
        if reference is not None:
            texts["right_answer"] = reference
        return float(self._bench.decide(messages_of(self._system, texts, "Grade the answer."), self._schema, "score"))


def make_judge(
    *,
    url: str,
    model: str,
    rubric: str,
    low: int,
    high: int,
    explain: bool,
    tries: int,
    concurrency: int,
    cache: str,
    temperature: float,
    max_tokens: int,
    extra: Mapping[str, Any],
    **settings: Any,
) -> PointwiseJudge:
    """The judge that the settings of `rating` describe. Raises ValueError for those that cannot be."""
    if not model or max_tokens < 1 or temperature < 0:
        raise ValueError(
            f"judge: got model {model!r}, max_tokens {max_tokens} and temperature {temperature:g}, expected the name "
            "that the endpoint knows it by, at least 1 token and nothing negative; correct them"
        )
    client = ChatClient(
        url=url,
        model=model,
        cache=cache or None,
        temperature=temperature,
        max_tokens=max_tokens,
        extra=extra,
        **connection(**settings),
    )
    return PointwiseJudge(
        client, rubric=rubric, low=low, high=high, explain=explain, tries=tries, concurrency=concurrency
    )


def check_judge(*, cache: str, **settings: Any) -> None:
    """What `make_judge` refuses, and a cache that cannot be written; leaves no folder."""
    make_judge(cache="", **settings)
    if not cache:
        return
    folder = Path(cache).expanduser()
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryDirectory(dir=there):  # modes do not tell of all that cannot be written to
            pass
    except OSError as error:
        raise ValueError(
            f"judge.cache: got {cache!r}, and {there} is no folder that can be written to ({error.strerror}), "
            "expected one; correct it"
        ) from error


@functools.cache
def _kept(settings: str) -> tuple[PointwiseJudge, Growth]:
    """The judge of these settings, made once in a process, and what it has counted since it was asked last."""
    return make_judge(**json.loads(settings)), Growth()


def longest_rating(
    samples: int, *, tries: int, concurrency: int, timeout: float, retries: int, max_wait: float, **others: Any
) -> float:
    """Seconds of one call; one request more finds out that an endpoint takes no schema."""
    rounds = -(-samples // concurrency)
    return (rounds * tries + 1) * longest_post(timeout=timeout, retries=retries, max_wait=max_wait)


@at_most(longest_rating)
@only_where(check_judge)
def rating(
    prompts: list[str],
    responses: list[str],
    *,
    url: str = "",
    model: str = "",
    rubric: str = "",
    low: int = 1,
    high: int = 10,
    explain: bool = True,
    tries: int = 2,
    concurrency: int = 8,
    cache: str = "",
    temperature: float = 0.0,
    max_tokens: int = 256,
    extra: Mapping[str, Any] = NOTHING,
    token_file: str = "",
    ca_file: str = "",
    timeout: float = 20.0,
    retries: int = 2,
    backoff: float = 0.5,
    max_wait: float = 5.0,
    max_answer_bytes: int = 1 << 20,
    reference: list[str | None] | None = None,
    prompt_messages: list[Conversation] | None = None,
    **columns: Any,
) -> Part:
    """What a judge says of each answer, a reason where it says nothing, and what it cost.

    Settings as of `PointwiseJudge` and `ChatClient`; `reference` and `prompt_messages` are columns.
    """
    settings = settings_of(rating, locals())
    judge, growth = _kept(json.dumps(settings, sort_keys=True))
    part = judge.grade(prompts, responses, reference=reference, prompt_messages=prompt_messages)
    return replace(part, counts=growth(judge.counts()))


class PairwiseJudge:
    """Which of two answers is better, asked in both orders. As a reward function it compares with a baseline."""

    def __init__(
        self,
        client: ChatClient,
        *,
        rubric: str = "Prefer the answer that is more correct, more helpful and safer.",
        explain: bool = True,
        tries: int = 3,
        concurrency: int = 8,
    ) -> None:
        """Arguments as for `PointwiseJudge`."""
        self._bench = Bench(client, tries=tries, concurrency=concurrency)
        self._schema = verdict_schema("better", {"type": "string", "enum": ["A", "B", "tie"]}, explain)
        form = form_of('"better": "A", "B" or "tie"', explain)
        self._system = f"You compare two answers to a question. {DATA}\n\nRubric: {rubric}\n\n{form}"
        self._shown: Counter[str] = Counter()
        self._pairs = self._agreed = 0

    def __call__(
        self, prompts: list[str], responses: list[str], *, baseline: list[str], **columns: Any
    ) -> list[float | None]:
        """1 where the response beats `baseline` in both orders, 0 where it loses in both, else 0.5."""
        values: dict[Verdict | None, float | None] = {"first": 1.0, "second": 0.0, "tie": 0.5, None: None}
        return [values[verdict] for verdict in self.compare(prompts, responses, baseline)]

    def compare(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[Verdict | None]:
        """The better answer to each prompt; "tie" where the orders disagree, None where one of them has no verdict."""
        triples = zip(prompts, first, second, strict=True)
        orders = [order for prompt, one, other in triples for order in ((prompt, one, other), (prompt, other, one))]
        better = self._bench.each(lambda order: self._better(*order), orders)
        return [self._agreement(*pair) for pair in zip(better[::2], better[1::2], strict=True)]

    def metrics(self) -> dict[str, float]:
        """Those of every judge, and how it treats places.

        `judge/position_bias`: of all verdicts that are no tie, the share for the answer shown first less the share
        for the other; 0 is even, 1 always the first. `judge/consistency`: share of pairs whose two orders agree.
        Both are left out where there is nothing to divide by.
        """
        metrics = self._bench.metrics() | {"judge/pairs": self._pairs}
        if decided := self._shown["A"] + self._shown["B"]:
            metrics["judge/position_bias"] = (self._shown["A"] - self._shown["B"]) / decided
        if self._pairs:
            metrics["judge/consistency"] = self._agreed / self._pairs
        return metrics

    def _better(self, prompt: str, answer_a: str, answer_b: str) -> str | None:
        texts = {"question": prompt, "answer_A": answer_a, "answer_B": answer_b}
        messages = messages_of(self._system, texts, "Compare answer_A with answer_B.")
        try:
            return str(self._bench.decide(messages, self._schema, "better"))
        except UnusableError:
            return None

    def _agreement(self, straight: str | None, swapped: str | None) -> Verdict | None:
        self._shown.update(one for one in (straight, swapped) if one is not None)
        if straight is None or swapped is None:
            return None
        self._pairs += 1
        if swapped != {"A": "B", "B": "A", "tie": "tie"}[straight]:
            return "tie"
        self._agreed += 1
        verdicts: dict[str, Verdict] = {"A": "first", "B": "second", "tie": "tie"}
        return verdicts[straight]


def _rows(
    prompts: list[str],
    responses: list[str],
    reference: list[str | None] | None,
    conversations: list[Conversation] | None,
) -> list[Row]:
    no_reference: list[str | None] = [None] * len(responses)
    no_turns: list[Conversation] = [()] * len(responses)
    return list(zip(prompts, responses, reference or no_reference, conversations or no_turns, strict=True))

"""Share a step's sequences out to N engines, and put the answers together in the order of the questions.

Which sequences form a share depends on the lengths and on N alone; only which engine samples it depends on who is done
first. A sample has a seed of its own, so neither shows in the samples.
"""

from __future__ import annotations

import heapq
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.engine_pool import Capacity, EnginePool
from actors.worker import ActorDiedError
from alignment.interfaces import Pending
from alignment.types import Prompt, Rollout

SHARES_UNDER_WAY = 2
"""Per engine: one that is sampled and one that waits there, so that no engine waits for the driver."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Some sequences of a step: one call of an engine."""

    positions: Sequence[int]
    """Of its rollouts among all of the step, in prompt order then sample order."""
    prompts: Sequence[Prompt]
    samples: Mapping[str, Any]
    """Which samples of each prompt, as `RolloutActor.generate` takes it."""
    tokens: int
    """Prompts and the longest possible answers: what its engine has to do at most."""


def make_shares(
    prompts: Sequence[Prompt], num_samples: int, *, num_engines: int, sequences: int, max_new_tokens: int
) -> list[Share]:
    """Neighbours in length form a share, the longest first; every share has about the same number of tokens.

    One engine gets one share; N get as many each as keep a share within `sequences`, at least one.
    """
    jobs = [(prompt, index) for prompt in prompts for index in range(num_samples)]
    cost = [len(prompt.prompt_ids) + max_new_tokens for prompt, _ in jobs]
    if jobs and num_engines == 1:
        whole = range(len(jobs))
        return [Share(positions=whole, prompts=prompts, samples={"num_samples": num_samples}, tokens=sum(cost))]
    order = sorted(range(len(jobs)), key=lambda i: -cost[i])
    num_shares = min(len(jobs), num_engines * math.ceil(len(jobs) / (num_engines * sequences)))
    shares: list[Share] = []
    start, left = 0, sum(cost)
    while start < len(order):
        others, remaining = num_shares - len(shares) - 1, len(order) - start
        target, size, tokens = left / (others + 1), 0, 0
        # A sequence belongs to the share that most of it fits into, as far as the others can take what is left.
        fewest, most = max(1, remaining - others * sequences), min(sequences, remaining - others)
        while size < most and (size < fewest or tokens + cost[order[start + size]] / 2 <= target):
            tokens += cost[order[start + size]]
            size += 1
        chosen = order[start : start + size]
        start, left = start + size, left - tokens
        shares.append(
            Share(
                positions=chosen,
                prompts=[jobs[i][0] for i in chosen],
                samples={"sample_indices": [jobs[i][1] for i in chosen]},
                tokens=tokens,
            )
        )
    return shares


@dataclass(frozen=True, kw_only=True, slots=True)
class _Call:
    """A share that an engine works on or will."""

    share: Share
    answer: Pending[list[Rollout]]
    life: int
    """Of its engine's processes, the one that was sent it."""


class Dispatch:
    """A `Pending` of all rollouts of one `generate`. An engine gets its next share when one of its comes back."""

    def __init__(
        self, pool: EnginePool, prompts: Sequence[Prompt], *, step: int, num_samples: int = 1, **settings: Any
    ) -> None:
        """`settings`: what else `RolloutActor.generate` takes."""
        self.pool, self.settings = pool, {"step": step, **settings}
        pool.begin_step(step)
        pool.note_work(len(prompts) * num_samples)
        pool.under_way.add(self)
        many = pool.num_engines > 1
        capacity = pool.capacity() if many else Capacity(sequences=0, max_new_tokens=0)
        self._waiting = deque(
            make_shares(
                prompts,
                num_samples,
                num_engines=pool.num_engines,
                sequences=capacity.sequences,
                max_new_tokens=settings.get("max_new_tokens") or capacity.max_new_tokens,
            )
        )
        self._calls: list[deque[_Call]] = [deque() for _ in range(pool.num_engines)]
        self._ahead = [0] * pool.num_engines
        """Tokens of each engine's calls."""
        self._room: list[tuple[int, int]] = []
        """A heap: tokens ahead and rank of the engines with room. An entry whose tokens are others by now is void."""
        self._held_back = set(range(pool.num_engines))
        """Engines that were loading their models when they last had room."""
        self._rollouts: dict[int, Rollout] = {}
        self._began = time.monotonic()
        self._seconds = [0.0] * pool.num_engines
        self._send_shares()

    def result(self) -> list[Rollout]:
        """Rollouts in prompt order then sample order. Raises ActorDiedError when engines die again and again."""
        while self._waiting or any(self._calls):
            sampling = [rank for rank, calls in enumerate(self._calls) if calls]
            starting = list(self.pool.starting)
            answers = [self._calls[rank][0].answer for rank in sampling]
            for done in self.pool.done(answers + [self.pool.starting[rank] for rank in starting]):
                if done < len(sampling):
                    self._take(sampling[done])
                else:
                    self.pool.finish_restart(starting[done - len(sampling)])
            self._send_shares()
        self.pool.note_seconds(self._seconds)
        self._seconds = [0.0] * len(self._seconds)
        self.pool.under_way.discard(self)
        return [self._rollouts[i] for i in range(len(self._rollouts))]

    def _take(self, rank: int) -> None:
        """The rollouts of an engine's oldest call; of one that died, its shares go to the front of those that wait."""
        calls = self._calls[rank]
        try:
            rollouts = calls[0].answer.result()
        except ActorDiedError as error:
            self._waiting.extendleft(call.share for call in reversed(calls))
            life = calls[0].life
            calls.clear()
            self._has_room(rank)
            self.pool.restart(rank, error, life=life)
            return
        self._rollouts.update(zip(calls.popleft().share.positions, rollouts, strict=True))
        self._seconds[rank] = time.monotonic() - self._began
        self._has_room(rank)

    def _has_room(self, rank: int) -> None:
        self._ahead[rank] = sum(call.share.tokens for call in self._calls[rank])
        heapq.heappush(self._room, (self._ahead[rank], rank))

    def _send_shares(self) -> None:
        """The next share goes to the engine with the fewest tokens ahead of it, until no engine has room."""
        for rank in self._held_back - self.pool.starting.keys():
            self._held_back.remove(rank)
            self._has_room(rank)
        while self._waiting and self._room:
            ahead, rank = heapq.heappop(self._room)
            if ahead != self._ahead[rank] or len(self._calls[rank]) == SHARES_UNDER_WAY:
                continue
            if rank in self.pool.starting:
                self._held_back.add(rank)
                continue
            share = self._waiting.popleft()
            answer = self.pool.generate(rank, share.prompts, **share.samples, **self.settings)
            self._calls[rank].append(_Call(share=share, answer=answer, life=self.pool.lives[rank]))
            self._has_room(rank)

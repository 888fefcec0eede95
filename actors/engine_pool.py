"""N engine processes behind one handle: one that dies is started again and given the current weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from actors.worker import ActorDiedError
from alignment.interfaces import Pending

MAX_RESTARTS = 3
"""In one step, of all engines together: more than that is no accident."""

ROLE = "rollout"


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """What one engine is sent at once."""

    sequences: int
    """Of one share, at most."""
    max_new_tokens: int


@runtime_checkable
class Engines(Protocol):
    """`EngineGroup`: processes that can be started again one by one."""

    num_workers: int

    def call(self, role: str, method: str, *args: Any, **kwargs: Any) -> Pending[Any]: ...
    def only(self, rank: int) -> Engines: ...
    def restart(self, rank: int) -> Pending[Any]: ...
    def dead(self) -> list[int]: ...
    def first_done(self, pendings: Sequence[Any]) -> int: ...


class EnginePool:
    """What is known about the engines, and how a dead one is replaced.

    What an engine needs to be whole again is in three places: its weights before the first sync are the base model's,
    afterwards the policy sends them once more; what it was sampling its `Dispatch` asks for again.
    """

    def __init__(self, group: Engines) -> None:
        self.group, self.num_engines = group, group.num_workers
        self.lives = [0] * group.num_workers
        """How often each was started again."""
        self.starting: dict[int, Pending[Any]] = {}
        """Engines that load their models: they are sent nothing until `finish_restart`."""
        self._send: Callable[[Any], Pending[int]] | None = None
        self._capacity: Capacity | None = None
        self._step: int | None = None
        self._restarts_in_step = self._restarts = 0
        self._seconds = [0.0] * group.num_workers

    def begin_step(self, step: int) -> None:
        """Engines that died in an earlier step do not count against this one."""
        if step != self._step:
            self._step, self._restarts_in_step = step, 0

    def capacity(self) -> Capacity:
        """Of each engine: they are all alike."""
        if self._capacity is None:
            capacity: Capacity = EveryEngine(self, lambda engines: engines.call(ROLE, "capacity")).result()
            self._capacity = capacity
        return self._capacity

    def generate(self, rank: int, *args: Any, **kwargs: Any) -> Pending[Any]:
        return self.group.only(rank).call(ROLE, "generate", *args, **kwargs)

    def first_done(self, pendings: Sequence[Pending[Any]]) -> int:
        return self.group.first_done(pendings)

    def receive(self, send: Callable[[Any], Pending[int]]) -> Pending[int]:
        """Let every engine be sent weights; `send` is kept for those that are started again later."""
        self._send = send
        return EveryEngine(self, send, then=self.starting.clear)

    def restart(self, rank: int, error: ActorDiedError, *, life: int | None = None) -> None:
        """Replace a process that died, unless it was the one of an earlier `life`.

        Raises:
            ActorDiedError: `error`, when too many died in this step.
        """
        if life is not None and life != self.lives[rank]:
            return
        if self._restarts_in_step == MAX_RESTARTS:
            raise error
        self._restarts_in_step += 1
        self._restarts += 1
        self.lives[rank] += 1
        print(
            f"rollout: engine {rank + 1} of {self.num_engines} died ({error.reason}); it is started again, restart "
            f"{self._restarts_in_step} of at most {MAX_RESTARTS} in this step",
            file=sys.stderr,
            flush=True,
        )
        self.starting[rank] = self.group.restart(rank)

    def restart_dead(self, ranks: Sequence[int], error: ActorDiedError) -> None:
        """Restart those of `ranks` that are dead. Raises `error` when none is: somebody else's process died."""
        dead = [rank for rank in ranks if self.group.only(rank).dead()]
        if not dead:
            raise error
        for rank in dead:
            self.restart(rank, error)

    def finish_restart(self, rank: int) -> None:
        """Bring an engine that has loaded its models to the current weights; one that died of it is started again."""
        try:
            self.starting[rank].result()
            if self._send is not None:
                self._send(self.group.only(rank)).result()
        except ActorDiedError as error:
            self.restart_dead([rank], error)
        else:
            del self.starting[rank]

    def note_seconds(self, seconds: Sequence[float]) -> None:
        """How long after a `generate` began each engine's last answer came; 0 for one that was not needed."""
        self._seconds = [a + b for a, b in zip(self._seconds, seconds, strict=True)]

    def metrics(self) -> dict[str, float]:
        """Restarts, and with several engines how much later the slowest was done than the mean of those that worked,
        since this was asked last."""
        metrics = {"rollout/engine_restarts_count": float(self._restarts)}
        worked = [seconds for seconds in self._seconds if seconds > 0]
        if self.num_engines > 1 and worked:
            metrics["rollout/slowest_over_mean"] = max(worked) * len(worked) / sum(worked)
        self._restarts, self._seconds = 0, [0.0] * self.num_engines
        return metrics


@dataclass(frozen=True, slots=True)
class _Failed:
    """A `Pending` that could not be started."""

    error: ActorDiedError

    def result(self) -> Any:
        raise self.error


class EveryEngine:
    """A `Pending` of a call that every engine must answer: when some die, they are replaced and all called anew."""

    def __init__(
        self,
        pool: EnginePool,
        call: Callable[[Any], Pending[Any]],
        *,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """`call` is given the group. `then` is called once all have answered."""
        self.pool, self.call, self.then = pool, call, then
        self._attempt = self._start()

    def _start(self) -> Pending[Any]:
        try:
            return self.call(self.pool.group)
        except ActorDiedError as error:
            return _Failed(error)

    def result(self) -> Any:
        while True:
            try:
                answer = self._attempt.result()
            except ActorDiedError as error:
                self.pool.restart_dead(range(self.pool.num_engines), error)
                self._attempt = self._start()
            else:
                self.then()
                return answer

"""N engine processes behind one handle: one that dies is started again and given the current weights, and between
steps one may come or go."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from actors.engine_scaling import Scaling
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
    def done(self, pendings: Sequence[Any]) -> list[int]: ...
    def begin_engine(self) -> Any: ...
    def stage(self, newcomer: Any) -> Literal["waits", "loads", "ready"]: ...
    def admit(self, newcomer: Any) -> None: ...
    def dismiss(self, newcomer: Any) -> None: ...
    def retire(self) -> None: ...


class EnginePool:
    """What is known about the engines, and how a dead one is replaced.

    What an engine needs to be whole again is in three places: its weights before the first sync are the base model's,
    afterwards the policy sends them once more; what it was sampling its `Dispatch` asks for again.
    """

    def __init__(self, group: Engines, limits: tuple[int, int] | None = None) -> None:
        """`limits`: the fewest and the most engines, where their number follows the work."""
        self.group, self.num_engines = group, group.num_workers
        self.scaling = Scaling(*limits) if limits is not None and limits[0] < limits[1] else None
        self.under_way: weakref.WeakSet[Any] = weakref.WeakSet()
        """Calls that have yet to be collected: until they are, no engine comes or goes."""
        self._coming: Any = None
        self._said_no_room = False
        self._failed_starts = 0
        self.lives = [0] * group.num_workers
        """How often each was started again. One that is gone keeps its number, for who comes in its place."""
        self.starting: dict[int, Pending[Any]] = {}
        """Engines that load their models: they are sent nothing until `finish_restart`."""
        self._send: Callable[[Any], Pending[int]] | None = None
        self._capacity: Capacity | None = None
        self._step: int | None = None
        self._restarts_in_step = self._restarts = 0
        self._seconds: dict[int, float] = {}

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

    def done(self, pendings: Sequence[Pending[Any]]) -> list[int]:
        return self.group.done(pendings)

    def receive(self, send: Callable[[Any], Pending[int]]) -> Pending[int]:
        """Let every engine be sent weights; `send` is kept for those that are started again later."""
        self._send = send
        if self.scaling is not None and not self.under_way:
            self._change_number(self.scaling)
        return EveryEngine(self, send, then=self.starting.clear)

    def note_work(self, num_sequences: int) -> None:
        """What a call asks of the engines."""
        if self.scaling is not None:
            self.scaling.note(math.ceil(num_sequences / self.capacity().sequences), self.num_engines)

    def _change_number(self, scaling: Scaling) -> None:
        """Between two steps, before the weights are sent: who comes is sent them with the others, and proves them."""
        if self._coming is not None:
            self._welcome(scaling)
        change = scaling.decide()
        if change > 0 and self._coming is None and self.num_engines < scaling.most:
            self._coming, self._said_no_room = self.group.begin_engine(), False
        elif change < 0 and self._coming is not None:
            self.group.dismiss(self._coming)
            self._coming = None
        elif change < 0:
            self.group.retire()
            self.num_engines -= 1
            self.starting.pop(self.num_engines, None)
            _say(f"not enough work for all engines; {self.num_engines} go on")

    def _welcome(self, scaling: Scaling) -> None:
        """Take the engine in that was started, if it has its models by now."""
        which, stage = f"engine {self.num_engines + 1} of at most {scaling.most}", self.group.stage(self._coming)
        if stage == "waits" and not self._said_no_room:
            self._said_no_room = True
            _say(f"no room for {which} yet; the run goes on with {self.num_engines}")
        if stage != "ready":
            return
        coming, self._coming = self._coming, None
        try:
            coming.loaded.result()
        except ActorDiedError as error:
            self.group.dismiss(coming)
            self._failed_starts += 1
            if self._failed_starts == MAX_RESTARTS:
                scaling.most = self.num_engines
            last = "; no other is tried" if self._failed_starts == MAX_RESTARTS else ""
            _say(f"{which} died while it started ({error.reason}); the run goes on with {self.num_engines}{last}")
            return
        self.group.admit(coming)
        if self.num_engines < len(self.lives):
            self.lives[self.num_engines] += 1
        else:
            self.lives.append(0)
        self.num_engines += 1
        _say(f"shares were waiting; {which} has joined")

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
        _say(
            f"engine {rank + 1} of {self.num_engines} died ({error.reason}); it is started again, restart "
            f"{self._restarts_in_step} of at most {MAX_RESTARTS} in this step"
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
        for rank, one in enumerate(seconds):
            self._seconds[rank] = self._seconds.get(rank, 0.0) + one

    def metrics(self) -> dict[str, float]:
        """Restarts, and with several engines how much later the slowest was done than the mean of those that worked,
        since this was asked last; where their number may change, how many sampled and what waited for each."""
        metrics = {"rollout/engine_restarts_count": float(self._restarts)}
        worked = [seconds for seconds in self._seconds.values() if seconds > 0]
        if len(self._seconds) > 1 and worked:
            metrics["rollout/slowest_over_mean"] = max(worked) * len(worked) / sum(worked)
        if self.scaling is not None:
            metrics["rollout/engines"] = float(self.scaling.num_engines)
            metrics["rollout/engine_queue"] = self.scaling.queue
        self._restarts, self._seconds = 0, {}
        return metrics


def _say(text: str) -> None:
    print(f"rollout: {text}", file=sys.stderr, flush=True)


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

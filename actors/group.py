"""N Ray processes that hold the same roles, called as one."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.worker import Actor, ActorDiedError, Host
from alignment.distributed import balanced_parts

PROCESS_ENVIRONMENT = {
    # Ray runs actor methods off the main thread, whose own arena would give every freed block back to the kernel.
    "MALLOC_ARENA_MAX": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


SILENCE = 60.0
"""Seconds without an answer after which a line on the screen says so, again and again."""
RESTART_TIMEOUT = 120.0
"""Seconds that a process which died may take to be placed and to exist again; loading its models comes after."""


class RefPending:
    """A `Pending` over Ray object refs, one per worker: the first one's answer, or the items of all in one list."""

    def __init__(
        self, refs: Sequence[ray.ObjectRef], what: str, *, parts: Sequence[Sequence[int]] | None = None
    ) -> None:
        """`parts`: which items each worker was given; None takes the first one's answer."""
        self.refs, self.what, self.parts = list(refs), what, parts

    def result(self) -> Any:
        """Wait. The actor's own exception is raised as it was there; a dead process raises ActorDiedError."""
        try:
            answers = ray.get(self.refs)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, BaseException):
                raise cause from error
            raise
        except RayActorError as error:
            raise ActorDiedError(self.what, _reason(error)) from error
        return answers[0] if self.parts is None else _in_order(self.parts, answers)


def _in_order(parts: Sequence[Sequence[int]], answers: Sequence[list[Any]]) -> list[Any]:
    """The answers to all items in the order of the items, of which each may have several."""
    of_item: dict[int, list[Any]] = {}
    for part, answer in zip(parts, answers, strict=True):
        each, rest = divmod(len(answer), len(part) or 1)
        assert not rest, f"{len(answer)} answers to {len(part)} items"
        of_item |= {item: answer[k * each : (k + 1) * each] for k, item in enumerate(part)}
    return [one for item in sorted(of_item) for one in of_item[item]]


def _reason(error: RayActorError) -> str:
    """The last line of what Ray says, without its advice."""
    lines = str(error).strip().splitlines() or ["no reason given"]
    return lines[-1].split(" Some common causes")[0].rstrip(".")


class ActorGroup:
    """`num_workers` processes, each with the same roles. Rank 0 is first; its answer stands for a broadcast call.

    Usable from a script of one's own:

        group = ActorGroup({"rollout": RolloutActor(...)}, num_workers=2)
        group.start().result()
        rollouts = group.scatter("rollout", "generate", prompts, step=0).result()
    """

    def __init__(
        self,
        actors: Mapping[str, Actor],
        *,
        num_workers: int = 1,
        cpus_per_worker: float = 1.0,
        gpus_per_worker: float = 0.0,
        threads: int | None = None,
        takes_turns: bool = False,
        shares_memory: bool = False,
        placement: PlacementGroup | None = None,
        bundles: Sequence[int] = (),
    ) -> None:
        self.roles, self.num_workers = tuple(actors), num_workers
        self._meets = any(actor.meets(num_workers) for actor in actors.values())
        self._actors = dict(actors)
        self._settings = {"threads": threads, "takes_turns": takes_turns, "shares_memory": shares_memory}
        self._options: dict[str, Any] = {
            "num_cpus": cpus_per_worker,
            "num_gpus": gpus_per_worker,
            "runtime_env": {"env_vars": PROCESS_ENVIRONMENT},
        }
        self._placement, self._bundles = placement, bundles
        self.workers: list[Any] = [self._new_worker(rank) for rank in range(num_workers)]

    def _new_worker(self, rank: int) -> Any:
        """A process with the roles, not yet set up, in the bundle of its rank."""
        # The class name is what `ray list actors` and the logs show: the roles, not "Host".
        name = "_".join(type(actor).__name__ for actor in self._actors.values())
        remote: Any = ray.remote(type(name, (Host,), {"__module__": Host.__module__}))
        strategy = (
            PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=self._bundles[rank])
            if self._placement is not None
            else None
        )
        options = remote.options(scheduling_strategy=strategy, **self._options)
        return options.remote(self._actors, rank=rank, **self._settings)

    def start(self) -> RefPending:
        """Load the models. A failure there reaches the caller through `.result()`."""
        meeting = None
        if self._meets:
            backend = "nccl" if self._options["num_gpus"] else "gloo"
            meeting = self.workers[0].open_ranks.remote(world_size=self.num_workers, backend=backend)
        return RefPending([w.setup.remote(meeting) for w in self.workers], self._name("setup"))

    def call(self, role: str, method: str, *args: Any, **kwargs: Any) -> RefPending:
        """Every worker runs the method on the same arguments; rank 0's answer is the result.

        A pending of another group may be an argument: its answer goes from there to here without the caller.
        """
        args = tuple(arg.refs[0] if isinstance(arg, RefPending) else self._shared(arg) for arg in args)
        refs = [w.call.remote(role, method, *args, **kwargs) for w in self.workers]
        return RefPending(refs, self._name(method, role))

    def _shared(self, argument: Any) -> Any:
        """In the object store once, not sent with each of several calls."""
        return ray.put(argument) if self.num_workers > 1 else argument

    def first(self, role: str, method: str, *args: Any, **kwargs: Any) -> RefPending:
        """Rank 0 alone runs the method."""
        return RefPending([self.workers[0].call.remote(role, method, *args, **kwargs)], self._name(method, role))

    def scatter(
        self, role: str, method: str, items: Sequence[Any], *, lengths: Sequence[int] | None = None, **kwargs: Any
    ) -> RefPending:
        """Workers share `items`, balanced by `lengths` in tokens; the answers come back in the order of `items`."""
        parts = balanced_parts(lengths or [1] * len(items), self.num_workers)
        # Those that hold a model in parts are all needed, whoever has items.
        busy = [(w, part) for w, part in zip(self.workers, parts, strict=True) if part or not items or self._meets]
        refs = [worker.call.remote(role, method, [items[i] for i in part], **kwargs) for worker, part in busy]
        return RefPending(refs, self._name(method, role), parts=[part for _, part in busy])

    def stop(self) -> None:
        for worker in self.workers:
            ray.kill(worker)

    def _name(self, method: str, role: str | None = None) -> str:
        return f"{role or '+'.join(self.roles)} actor, {method}"


class EngineGroup(ActorGroup):
    """Processes that hold nothing that cannot be had again: one that died is started again in its place."""

    def only(self, rank: int) -> EngineGroup:
        """The same, of one process."""
        alone = copy.copy(self)
        alone.workers, alone.num_workers = [self.workers[rank]], 1
        return alone

    def restart(self, rank: int) -> RefPending:
        """A new process where the old one was, as it loads its models.

        Raises:
            ActorDiedError: the cluster has no room for it any more.
        """
        ray.kill(self.workers[rank])  # an unreachable one may still be there
        self.workers[rank] = worker = self._new_worker(rank)
        placed, _ = ray.wait([worker.pid.remote()], timeout=RESTART_TIMEOUT)
        if not placed:
            raise ActorDiedError(self._name("restart"), f"and found no place again within {RESTART_TIMEOUT:g} s")
        return RefPending([worker.setup.remote()], self._name("setup"))

    def dead(self) -> list[int]:
        """The ranks whose process is gone. Waits for what the others have to do."""
        ranks = []
        for rank, ref in enumerate([worker.pid.remote() for worker in self.workers]):
            try:
                ray.get(ref)
            except RayActorError:
                ranks.append(rank)
        return ranks

    def first_done(self, pendings: Sequence[RefPending]) -> int:
        """Index of a pending of one worker that has its answer, or failed; waits for one."""
        refs = [pending.refs[0] for pending in pendings]
        began = time.monotonic()
        while not (ready := ray.wait(refs, num_returns=1, timeout=SILENCE)[0]):
            seconds = time.monotonic() - began
            print(f"{'+'.join(self.roles)}: no answer for {seconds:.0f} s, still waiting", file=sys.stderr, flush=True)
        return refs.index(ready[0])

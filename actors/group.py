"""N Ray processes that hold the same roles, called as one."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.object_store import Shelf, packed
from actors.placement import Place
from actors.worker import Actor, ActorDiedError, Host
from alignment.distributed import balanced_parts
from alignment.types import Experience

PROCESS_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
}


SILENCE = 60.0
"""Seconds without an answer after which a line on the screen says so, again and again."""
RESTART_TIMEOUT = 120.0
"""Seconds that a process which died may take to be placed and to exist again; loading its models comes after."""


class RayHost(Host):
    """A host whose answers travel packed."""

    def call(self, role: str, method: str, *args: Any, **kwargs: Any) -> Any:
        return packed(super().call(role, method, *args, **kwargs))


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
        resources: Mapping[str, float] | None = None,
        places: Sequence[Place] = (),
        shelf: Shelf | None = None,
    ) -> None:
        """
        Args:
            places: of each process; without them Ray puts each where there is room.
            shelf: of all groups that are given the same batches; without it they are sent to each group anew.
        """
        self.roles, self.num_workers = tuple(actors), num_workers
        self._meets = any(actor.meets(num_workers) for actor in actors.values())
        self._actors = dict(actors)
        self._settings = {"threads": threads, "takes_turns": takes_turns, "shares_memory": shares_memory}
        self._options: dict[str, Any] = {
            "num_cpus": cpus_per_worker,
            "num_gpus": gpus_per_worker,
            "resources": dict(resources or {}),
            "runtime_env": {"env_vars": PROCESS_ENVIRONMENT},
        }
        self._places: list[Place | None] = list(places) or [None] * num_workers
        self._shelf = shelf or Shelf()
        self.workers: list[Any] = [self._new_worker(rank, place) for rank, place in enumerate(self._places)]

    def _new_worker(self, rank: int, place: Place | None) -> Any:
        """A process with the roles, not yet set up."""
        # The class name is what `ray list actors` and the logs show: the roles, not "Host".
        name = "_".join(type(actor).__name__ for actor in self._actors.values())
        remote: Any = ray.remote(type(name, (RayHost,), {"__module__": RayHost.__module__}))
        strategy = place and PlacementGroupSchedulingStrategy(place[0], placement_group_bundle_index=place[1])
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
        if isinstance(argument, Experience):
            return self._shelf.whole(argument)
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
        refs = [worker.call.remote(role, method, self._shelf.part(items, part), **kwargs) for worker, part in busy]
        return RefPending(refs, self._name(method, role), parts=[part for _, part in busy])

    def stop(self) -> None:
        for worker in self.workers:
            ray.kill(worker)

    def _name(self, method: str, role: str | None = None) -> str:
        return f"{role or '+'.join(self.roles)} actor, {method}"


@dataclass(frozen=True, slots=True)
class Newcomer:
    """An engine that is started while the others work."""

    worker: Any
    place: Place
    loaded: RefPending
    """Once it has its models."""


class EngineGroup(ActorGroup):
    """Processes that hold nothing that cannot be had again: one that died is started again in its place, and their
    number may change."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._own_places = list(self._places)
        """Those that were reserved for the whole run, by rank."""
        self._newcomer: Newcomer | None = None

    def begin_engine(self) -> Newcomer:
        """Start the engine of the next rank, as soon as the cluster has room: Ray's autoscaler counts a placement
        group that waits among what it has to find machines for."""
        rank = self.num_workers
        place = self._own_places[rank] if rank < len(self._own_places) else None
        if place is None:
            bundle = {"CPU": self._options["num_cpus"], "GPU": self._options["num_gpus"], **self._options["resources"]}
            place = (placement_group([{kind: amount for kind, amount in bundle.items() if amount}]), 0)
        worker = self._new_worker(rank, place)
        self._newcomer = Newcomer(worker, place, RefPending([worker.setup.remote()], self._name("setup")))
        return self._newcomer

    def stage(self, newcomer: Newcomer) -> Literal["waits", "loads", "ready"]:
        """Whether it has a place, and its models. One that died is ready: `loaded` tells."""
        if ray.wait(newcomer.loaded.refs, timeout=0)[0]:
            return "ready"
        return "loads" if placement_group_table(newcomer.place[0])["state"] == "CREATED" else "waits"

    def admit(self, newcomer: Newcomer) -> None:
        """From now on it is one of the group."""
        self.workers.append(newcomer.worker)
        self._places.append(newcomer.place)
        self.num_workers += 1
        self._newcomer = None

    def dismiss(self, newcomer: Newcomer) -> None:
        """End one that was not admitted."""
        ray.kill(newcomer.worker)
        self._give_back(newcomer.place)
        self._newcomer = None

    def retire(self) -> None:
        """End the engine of the last rank."""
        ray.kill(self.workers.pop())
        self._give_back(self._places.pop())
        self.num_workers -= 1

    def _give_back(self, place: Place | None) -> None:
        if place is not None and place not in self._own_places:
            remove_placement_group(place[0])

    def stop(self) -> None:
        super().stop()
        if self._newcomer is not None:
            self.dismiss(self._newcomer)
        for place in self._places:
            self._give_back(place)

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
        self.workers[rank] = worker = self._new_worker(rank, self._places[rank])
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

    def done(self, pendings: Sequence[RefPending]) -> list[int]:
        """Indices of the pendings of one worker each that have their answer, or failed; waits for one."""
        index = {pending.refs[0]: i for i, pending in enumerate(pendings)}
        refs = list(index)
        began = time.monotonic()
        while not ray.wait(refs, num_returns=1, timeout=SILENCE)[0]:
            seconds = time.monotonic() - began
            print(f"{'+'.join(self.roles)}: no answer for {seconds:.0f} s, still waiting", file=sys.stderr, flush=True)
        # Asking about all of them for each that is done would cost the square of their number.
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        return [index[ref] for ref in ready]

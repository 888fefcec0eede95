"""N Ray processes that hold the same roles, called as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.worker import Actor, Host

PROCESS_ENVIRONMENT = {
    # Ray runs actor methods off the main thread, whose own arena would give every freed block back to the kernel.
    "MALLOC_ARENA_MAX": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class ActorDiedError(RuntimeError):
    """A process of a group is gone."""


class RefPending:
    """A `Pending` over Ray object refs, one per worker; `merge` turns the answers into one."""

    def __init__(self, refs: Sequence[ray.ObjectRef], what: str, *, concatenate: bool = False) -> None:
        self.refs, self.what, self.concatenate = list(refs), what, concatenate

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
            reason = str(error).strip().splitlines()
            raise ActorDiedError(
                f"{self.what}: the actor's process died ({reason[-1] if reason else 'no reason given'}); "
                "the last completed step is on disk: run the same command again with --resume auto"
            ) from error
        return [item for answer in answers for item in answer] if self.concatenate else answers[0]


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
        # The class name is what `ray list actors` and the logs show: the roles, not "Host".
        name = "_".join(type(actor).__name__ for actor in actors.values())
        remote: Any = ray.remote(type(name, (Host,), {"__module__": Host.__module__}))
        self.workers: list[Any] = []
        for rank in range(num_workers):
            strategy = (
                PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=bundles[rank])
                if placement is not None
                else None
            )
            options = remote.options(
                num_cpus=cpus_per_worker,
                num_gpus=gpus_per_worker,
                scheduling_strategy=strategy,
                runtime_env={"env_vars": PROCESS_ENVIRONMENT},
            )
            settings = {"threads": threads, "takes_turns": takes_turns, "shares_memory": shares_memory}
            self.workers.append(options.remote(dict(actors), rank=rank, **settings))

    def start(self) -> RefPending:
        """Load the models. A failure there reaches the caller through `.result()`."""
        return RefPending([w.setup.remote() for w in self.workers], self._name("setup"), concatenate=False)

    def call(self, role: str, method: str, *args: Any, **kwargs: Any) -> RefPending:
        """Every worker runs the method on the same arguments; rank 0's answer is the result."""
        args = tuple(arg.refs[0] if isinstance(arg, RefPending) else arg for arg in args)
        refs = [w.call.remote(role, method, *args, **kwargs) for w in self.workers]
        return RefPending(refs, self._name(method, role))

    def scatter(self, role: str, method: str, items: Sequence[Any], **kwargs: Any) -> RefPending:
        """Workers share `items` in contiguous slices; the answers come back in the order of `items`."""
        size = max(1, -(-len(items) // self.num_workers))
        slices = [items[i : i + size] for i in range(0, len(items), size)]
        refs = [
            worker.call.remote(role, method, part, **kwargs)
            for worker, part in zip(self.workers, slices, strict=False)
        ]
        return RefPending(refs, self._name(method, role), concatenate=True)

    def put(self, role: str, method: str, **kwargs: Any) -> RefPending:
        """Rank 0 runs the method; its answer stays in the object store until another group's `call` takes it."""
        return RefPending([self.workers[0].call.remote(role, method, **kwargs)], self._name(method, role))

    def stop(self) -> None:
        for worker in self.workers:
            ray.kill(worker)

    def _name(self, method: str, role: str | None = None) -> str:
        return f"{role or '+'.join(self.roles)} actor, {method}"

"""All roles in this process: the same actors, no Ray. Calls finish before they return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.worker import Actor, Host


@dataclass(frozen=True, slots=True)
class Done:
    """A `Pending` whose value is here already."""

    value: Any

    def result(self) -> Any:
        return self.value


class LocalGroup:
    """One process' worth of roles, called directly. Same methods as `ActorGroup`."""

    num_workers = 1

    def __init__(self, actors: Mapping[str, Actor], *, threads: int | None = None) -> None:
        self.host = Host(actors, threads=threads)
        self.roles = tuple(actors)

    def start(self) -> Done:
        return Done([self.host.setup()])

    def call(self, role: str, method: str, *args: Any, **kwargs: Any) -> Done:
        return Done(self.host.call(role, method, *_values(args), **kwargs))

    def scatter(
        self, role: str, method: str, items: Sequence[Any], *, lengths: Sequence[int] | None = None, **kwargs: Any
    ) -> Done:
        return self.call(role, method, items, **kwargs)

    def first(self, role: str, method: str, *args: Any, **kwargs: Any) -> Done:
        return self.call(role, method, *args, **kwargs)

    def stop(self) -> None:
        for actor in self.host.actors.values():
            actor.close()
        self.host.actors.clear()


def _values(args: Sequence[Any]) -> list[Any]:
    return [arg.value if isinstance(arg, Done) else arg for arg in args]

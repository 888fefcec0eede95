"""Which way weights go between the processes of a run, and the broadcast group where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from actors.rendezvous import Rendezvous
from actors.weight_routes import Route, choose_route
from alignment.interfaces import Pending

RouteChoice = Literal["auto", "object_store", "cuda_ipc", "broadcast"]


class Processes(Protocol):
    """A group of processes, as far as it is needed here."""

    num_workers: int

    def call(self, role: str, method: str, *args: Any, **kwargs: Any) -> Pending[Any]: ...
    def first(self, role: str, method: str, *args: Any, **kwargs: Any) -> Pending[Any]: ...


class WeightLinks:
    """The policy's end of the links to the engines."""

    def __init__(self, policy: Processes, choice: RouteChoice = "auto") -> None:
        self.policy, self.choice = policy, choice
        self._linked: Sequence[Any] | None = None
        self._route: Route = "object_store"

    def route(self, engines: Sequence[Processes], processes: Sequence[Any]) -> Route:
        """The way to `engines`, one group each; whatever it needs is set up when `processes`, their names, are new."""
        if self._linked != processes:
            self._route = self._choose(engines)
            if self._route == "broadcast":
                self._meet(engines)
            self._linked = list(processes)
        return self._route

    def _choose(self, engines: Sequence[Processes]) -> Route:
        if self.choice != "auto":
            return self.choice
        asked = [engine.call("rollout", "whereabouts") for engine in engines]
        return choose_route(self.policy.call("policy", "whereabouts").result(), [one.result() for one in asked])

    def _meet(self, engines: Sequence[Processes]) -> None:
        """Each engine's workers follow one another in the group, after the policy's rank 0."""
        workers = [engine.call("rollout", "num_receivers").result() for engine in engines]
        meeting: Rendezvous = self.policy.first("policy", "open_group", receivers=sum(workers)).result()
        joins = [
            engine.call("rollout", "join", meeting, first_rank=1 + sum(workers[:i]))
            for i, engine in enumerate(engines)
        ]
        for pending in (self.policy.first("policy", "meet"), *joins):
            pending.result()

"""The five roles as the loops see them: what `alignment.interfaces` asks for, over a group of either kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from actors.dispatch import Dispatch
from actors.engine_pool import EnginePool, Engines
from actors.weight_links import RouteChoice, WeightLinks
from actors.weight_routes import Route
from actors.weight_sync import BUCKETS_UNDER_WAY, SyncKind
from actors.worker import ActorDiedError
from alignment.interfaces import Metrics, Pending
from alignment.judgements import Judgement
from alignment.shared_prompts import Group as Candidates
from alignment.shared_prompts import group_length
from alignment.types import Experience, Prompt, Rollout, Score, SftExample


class Group(Protocol):
    """`ActorGroup` or `LocalGroup`."""

    num_workers: int
    roles: tuple[str, ...]

    def start(self) -> Pending[Any]: ...
    def call(self, role: str, method: str, *args: Any, **kwargs: Any) -> Pending[Any]: ...
    def first(self, role: str, method: str, *args: Any, **kwargs: Any) -> Pending[Any]: ...
    def scatter(
        self, role: str, method: str, items: Sequence[Any], *, lengths: Sequence[int] | None = None, **kwargs: Any
    ) -> Pending[Any]: ...
    def stop(self) -> None: ...


class Handle:
    """A role and the group that runs it."""

    role: str

    def __init__(self, group: Group) -> None:
        self.group = group

    def save(self, folder: Path) -> Pending[Any]:
        return self.group.call(self.role, "save", folder)

    def load(self, folder: Path) -> Pending[Any]:
        return self.group.call(self.role, "load", folder)


@dataclass(frozen=True, slots=True)
class InOrder:
    """A `Pending` made of steps: the first that failed is the one that is raised, the last one's answer the result."""

    steps: Sequence[Pending[Any]]

    def result(self) -> Any:
        return [step.result() for step in self.steps][-1]


def _lengths(rollouts: Sequence[Rollout]) -> list[int]:
    return [len(rollout.input_ids) for rollout in rollouts]


class RolloutHandle(Handle):
    """The engine in a process with other roles, or N engines of their own, which survive the death of a process."""

    role = "rollout"
    _sync_kind: SyncKind | None = None

    def __init__(self, group: Group, engine_limits: tuple[int, int] | None = None) -> None:
        """`engine_limits`: the fewest and the most engines, where their number follows the work."""
        super().__init__(group)
        self.pool = EnginePool(group, engine_limits) if isinstance(group, Engines) else None

    def sync_kind(self) -> SyncKind:
        if self._sync_kind is None:
            kind: SyncKind = self.group.call(self.role, "sync_kind").result()
            self._sync_kind = kind
        return self._sync_kind

    def generate(self, prompts: Sequence[Prompt], *, step: int, **kwargs: Any) -> Pending[list[Rollout]]:
        if self.pool is None:
            return self.group.scatter(self.role, "generate", prompts, step=step, **kwargs)
        return Dispatch(self.pool, prompts, step=step, **kwargs)

    def engines(self) -> tuple[list[Any], list[int]]:
        """A group for each engine, and what tells its process from the one that it replaced."""
        if self.pool is None:
            return [self.group], [0]
        ranks = range(self.pool.num_engines)
        return [self.pool.group.only(rank) for rank in ranks], [self.pool.lives[rank] for rank in ranks]

    def receive(self, send: Callable[[Any], Pending[int]]) -> Pending[int]:
        """Let `send` bring weights to the group it is given: all engines now, and one that has to be started again."""
        return send(self.group) if self.pool is None else self.pool.receive(send)

    def metrics(self) -> Metrics:
        return {"rollout/engine_restarts_count": 0.0} if self.pool is None else self.pool.metrics()


class SendingHandle(Handle):
    """A policy whose weights engines are sent. What changes them counts in `_changes`."""

    role = "policy"

    def __init__(self, group: Group, weight_route: RouteChoice = "auto") -> None:
        super().__init__(group)
        self._changes = 0
        self._links = WeightLinks(group, weight_route)

    def load(self, folder: Path) -> Pending[Any]:
        self._changes += 1
        return super().load(folder)

    def send_weights(self, rollout: Any, *, version: int) -> Pending[int]:
        """Make `rollout`, a RolloutHandle, sample from this policy. The bytes do not pass through the caller."""
        if rollout.group is self.group:
            return rollout.group.call(rollout.role, "follow", version=version)
        sent = self._changes

        def send(engines: Group) -> Pending[int]:
            if self._changes != sent:
                reason = f"and the policy no longer holds the weights of version {version} that it sampled from"
                raise ActorDiedError("rollout actor", reason)
            # One engine alone is one that was started again; it is no member of a group yet.
            alone = engines is not rollout.group
            route = "object_store" if alone else self._links.route(*rollout.engines())
            return self._send(engines, rollout.sync_kind(), version, route)

        return rollout.receive(send)

    def _send(self, engines: Group, kind: SyncKind, version: int, route: Route) -> Pending[int]:
        """Begin anew with every call: what an earlier one left half done is forgotten."""
        role = RolloutHandle.role
        if kind == "adapter":
            adapter = self.group.call(self.role, "export_adapter", version=version)
            steps = [engines.call(role, "receive_adapter", adapter)]
            probe = self.group.call(self.role, "probe", version=version)
            return InOrder([*steps, engines.call(role, "check_probe", probe)])
        whole = kind == "whole"
        buckets = self.group.call(self.role, "plan_sync", whole=whole).result()
        steps = [engines.call(role, "begin_sync", version=version, buckets=buckets)]
        for index in range(buckets):
            # Two are on their way: one is packed while the engine loads the other.
            if index >= BUCKETS_UNDER_WAY:
                steps[index - BUCKETS_UNDER_WAY].result()
            bucket = self.group.call(
                self.role, "export_bucket", version=version, index=index, whole=whole, route=route
            )
            if route == "broadcast":
                self.group.call(self.role, "broadcast_bucket", index=index)
            steps.append(engines.call(role, "receive_bucket", bucket))
        probe = self.group.call(self.role, "probe", version=version)
        steps.append(engines.call(role, "finish_sync", probe, version=version))
        return InOrder(steps)


class PolicyHandle(SendingHandle):
    """The policy of PPO."""

    def logprobs(self, rollouts: Sequence[Rollout]) -> Pending[list[Tensor]]:
        return self.group.scatter(self.role, "logprobs", rollouts, lengths=_lengths(rollouts))

    def update(self, experience: Experience, *, step: int) -> Pending[dict[str, float]]:
        self._changes += 1
        return self.group.call(self.role, "update", experience, step=step)

    def update_on_policy(self, experience: Experience, *, step: int) -> Pending[dict[str, float]]:
        self._changes += 1
        return self.group.call(self.role, "update_on_policy", experience, step=step)

    def check(self, experience: Experience) -> Pending[dict[str, float]]:
        return self.group.call(self.role, "check", experience)

    def export(self, folder: Path) -> Pending[Any]:
        return self.group.call(self.role, "export", folder)


class CriticHandle(Handle):
    role = "critic"

    def values(self, rollouts: Sequence[Rollout]) -> Pending[list[Tensor]]:
        return self.group.scatter(self.role, "values", rollouts, lengths=_lengths(rollouts))

    def update(self, experience: Experience, *, step: int) -> Pending[dict[str, float]]:
        return self.group.call(self.role, "update", experience, step=step)

    def fit(
        self, rollouts: Sequence[Rollout], rewards: Sequence[Tensor], *, step: int, gamma: float, gae_lambda: float
    ) -> Pending[tuple[list[Tensor], dict[str, float]]]:
        settings = {"step": step, "gamma": gamma, "gae_lambda": gae_lambda}
        return self.group.call(self.role, "fit", rollouts, rewards, **settings)


class ReferenceHandle(Handle):
    role = "reference"

    def logprobs(self, rollouts: Sequence[Rollout]) -> Pending[list[Tensor]]:
        return self.group.scatter(self.role, "logprobs", rollouts, lengths=_lengths(rollouts))


class RewardHandle(Handle):
    role = "reward_model"

    def score(self, rollouts: Sequence[Rollout]) -> Pending[list[Score]]:
        return self.group.scatter(self.role, "score", rollouts, lengths=_lengths(rollouts))


class FineTunedHandle(Handle):
    """The policy while it learns from data that is there."""

    role = "policy"

    def num_parameters(self) -> Pending[dict[str, int]]:
        return self.group.first(self.role, "num_parameters")

    def respond(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int, seed: int | None = None
    ) -> Pending[list[Rollout]]:
        lengths = [len(prompt.prompt_ids) for prompt in prompts]
        options = {"max_new_tokens": max_new_tokens, "seed": seed}
        return self.group.scatter(self.role, "respond", prompts, lengths=lengths, **options)

    def export(self, folder: Path) -> Pending[Any]:
        return self.group.call(self.role, "export", folder)


class SftHandle(FineTunedHandle):
    """The policy while it learns from examples."""

    def update(self, examples: Sequence[SftExample], *, step: int) -> Pending[dict[str, float]]:
        return self.group.call(self.role, "update", examples, step=step)

    def nll(self, examples: Sequence[SftExample]) -> Pending[list[float]]:
        lengths = [len(example.input_ids) for example in examples]
        return self.group.scatter(self.role, "nll", examples, lengths=lengths)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A `LogprobWorker` at a temperature."""

    group: Group
    method: str
    temperature: float

    def logprobs(self, rollouts: Sequence[Rollout]) -> Pending[list[Tensor]]:
        lengths = _lengths(rollouts)
        return self.group.scatter(
            FineTunedHandle.role, self.method, rollouts, lengths=lengths, temperature=self.temperature
        )


class PreferenceHandle(SendingHandle, FineTunedHandle):
    """The policy while it learns from pairs or labels, and the reference beside it."""

    def update(self, records: Sequence[Judgement], *reference: Sequence[Any], step: int) -> Pending[dict[str, float]]:
        self._changes += 1
        return self.group.call(self.role, "update", records, *reference, step=step)

    def logps(self, records: Sequence[Judgement]) -> Pending[list[Any]]:
        return self._scatter("logps", records)

    def ref_logps(self, records: Sequence[Judgement]) -> Pending[list[Any]]:
        return self._scatter("ref_logps", records)

    def candidate_logps(self, groups: Sequence[Candidates], *, row_tokens: int) -> Pending[list[list[float]]]:
        return self._scatter_candidates("candidate_logps", groups, row_tokens)

    def ref_candidate_logps(self, groups: Sequence[Candidates], *, row_tokens: int) -> Pending[list[list[float]]]:
        return self._scatter_candidates("ref_candidate_logps", groups, row_tokens)

    def follow(self, *, step: int) -> Pending[Any]:
        return self.group.call(self.role, "follow", step=step)

    def token_logprobs(self, method: str, *, temperature: float) -> TokenLogprobs:
        """`logprobs` of what learns, or `start_logprobs` of what it began as."""
        return TokenLogprobs(self.group, method, temperature)

    def release_reference(self) -> Pending[Any]:
        return self.group.call(self.role, "release_reference")

    def _scatter(self, method: str, records: Sequence[Judgement]) -> Pending[list[Any]]:
        lengths = [sum(map(len, record.sequences)) for record in records]
        return self.group.scatter(self.role, method, records, lengths=lengths)

    def _scatter_candidates(self, method: str, groups: Sequence[Candidates], row_tokens: int) -> Pending[Any]:
        lengths = [group_length(group) for group in groups]
        return self.group.scatter(self.role, method, groups, lengths=lengths, row_tokens=row_tokens)


class RewardTrainingHandle(Handle):
    """The reward model while it learns."""

    role = "reward_model"

    def update(self, records: Sequence[Judgement], *, step: int) -> Pending[dict[str, float]]:
        return self.group.call(self.role, "update", records, step=step)

    def scores(self, records: Sequence[Judgement]) -> Pending[list[tuple[float, ...]]]:
        lengths = [sum(map(len, record.sequences)) for record in records]
        return self.group.scatter(self.role, "scores", records, lengths=lengths)

    def export(self, folder: Path) -> Pending[Any]:
        return self.group.call(self.role, "export", folder)

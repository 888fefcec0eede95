"""Changes that would make a run fit, smallest first. Each is placed again by the same arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, TypeVar

from alignment.config import (
    ROLES,
    ClusterConfig,
    Config,
    DpoRunConfig,
    IterativeRunConfig,
    KtoRunConfig,
    LiveRunConfig,
    PpoRunConfig,
    RankedRunConfig,
    RankRunConfig,
    RewardModelRunConfig,
    SftRunConfig,
)
from alignment.config.cluster import RoleConfig
from alignment.planning.placement import Machines, Placed, place
from alignment.planning.processes import ProcessMemory

ConfigT = TypeVar("ConfigT", bound=Config)
RunAnyConfig = (
    PpoRunConfig
    | RewardModelRunConfig
    | SftRunConfig
    | RankRunConfig
    | DpoRunConfig
    | KtoRunConfig
    | LiveRunConfig
    | IterativeRunConfig
)
LORA_RANK = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """A run, its machines' roles, and the machines."""

    config: RunAnyConfig
    cluster: ClusterConfig
    machines: Machines

    @property
    def learners(self) -> dict[str, str]:
        """The roles that learn, and where a config keeps the adapter and the micro-batch of each."""
        if isinstance(self.config, PpoRunConfig):
            return {"policy": "policy", "critic": "critic"}
        if isinstance(self.config, RankRunConfig):
            return {}
        return {"reward_model" if isinstance(self.config, RewardModelRunConfig) else "policy": "training"}

    @property
    def frozen(self) -> tuple[str, ...]:
        """The roles that hold weights of their own and do not learn."""
        if isinstance(self.config, RankedRunConfig):
            return ("reward_model",) if self.config.reward.model is not None else ()
        if not isinstance(self.config, PpoRunConfig):
            return ()
        beside = any({"policy", "reference"} <= set(group) for group in self.cluster.colocate)
        reference = () if beside and self.config.policy.adapter.enabled else ("reference",)
        return (*reference, *(("reward_model",) if self.config.reward.model is not None else ()))

    def machines_of(self, role: str) -> RoleConfig:
        found: RoleConfig = getattr(self.cluster, role)
        return found

    def longest_row(self, key: str) -> int:
        """Tokens without which a budget of `key` would not hold one row."""
        if isinstance(self.config, IterativeRunConfig):
            return 2 * self.config.max_tokens
        if isinstance(self.config, PpoRunConfig | RankRunConfig):
            return self.config.data.max_prompt_tokens + self.config.rollout.max_new_tokens
        return self.config.data.max_tokens * (1 if isinstance(self.config, SftRunConfig | KtoRunConfig) else 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """Keys of the recipe's config and of the cluster's that are set anew, or another number of nodes."""

    config: Mapping[str, Any] = field(default_factory=dict)
    cluster: Mapping[str, Any] = field(default_factory=dict)
    nodes: int | None = None

    @property
    def words(self) -> str:
        settings = [f"{key}: {str(value).lower()}" for key, value in {**self.config, **self.cluster}.items()]
        return ", ".join([f"{self.nodes} nodes", *settings] if self.nodes else settings)

    @property
    def splits(self) -> bool:
        return any(key.endswith(".zero_stage") for key in self.cluster)

    def includes(self, other: Change) -> bool:
        """Whether it sets all that `other` does."""
        same_nodes = other.nodes in (None, self.nodes)
        return (
            same_nodes
            and other.config.items() <= self.config.items()
            and other.cluster.items() <= self.cluster.items()
        )

    def of(self, scenario: Scenario) -> Scenario:
        """The scenario after it.

        Raises:
            ValueError: a config refuses it.
        """
        return replace(
            scenario,
            config=changed(scenario.config, self.config),
            cluster=changed(scenario.cluster, self.cluster),
            machines=replace(scenario.machines, nodes=self.nodes or scenario.machines.nodes),
        )


Count = Callable[[Scenario], list[ProcessMemory]]


def changed(config: ConfigT, changes: Mapping[str, Any]) -> ConfigT:
    """A config with dotted keys set anew, and checked."""
    data = config.model_dump()
    for key, value in changes.items():
        *path, last = key.split(".")
        section = data
        for name in path:
            section = section[name]
        section[last] = value
    return type(config).model_validate(data)


def suggestions(scenario: Scenario, count: Count, *, limit: int = 3) -> list[str]:
    """Up to `limit` single changes that make the run fit, smallest first; else the shortest row of them that does.

    Empty when it fits as it is, or when nothing here helps.
    """
    if place(count(scenario), scenario.machines).fits:
        return []
    candidates = list(changes(scenario))
    alone: list[Change] = []
    for change in candidates:
        if not any(change.includes(other) for other in alone) and fits_after(scenario, [change], count):
            alone.append(change)
    if alone:
        return [change.words for change in alone[:limit]]
    # What is split cannot be stored in four bits, so one row is tried with each.
    for tried in (candidates, [change for change in candidates if not change.splits]):
        if row := _row(scenario, tried, count):
            return ["all of: " + "; ".join(change.words for change in row)]
    return []


def fits_after(scenario: Scenario, row: Sequence[Change], count: Count) -> bool:
    placed = _placed_after(scenario, row, count)
    return placed is not None and placed.fits


def changes(scenario: Scenario) -> Iterator[Change]:
    """What is tried: from what leaves the weights alone to what buys machines."""
    config, keys = scenario.config, tuple(scenario.learners.values())
    if micro := {key: value for name in keys for key, value in _one_row(scenario, name).items()}:
        yield Change(config=micro)
    if keys and not config.model.gradient_checkpointing:
        yield Change(config={"model.gradient_checkpointing": True})
    yield from _splits(scenario)
    yield from _offloads(scenario)
    if config.model.dtype == "float32":
        yield Change(config={"model.dtype": "bfloat16"})
    if full := [key for key in keys if not getattr(config, key).adapter.enabled]:
        yield Change(
            config={f"{key}.adapter.{name}": value for key in full for name, value in _lora(config, key).items()}
        )
    if keys:
        yield Change(
            config={f"{key}.adapter.{name}": value for key in keys for name, value in _qlora(config, key).items()}
        )
    if shared := [role for role in ROLES if 0 < getattr(scenario.cluster, role).gpus_per_worker < 1]:
        yield Change(cluster={f"{role}.gpus_per_worker": 1.0 for role in shared})
    for times in (2, 4, 8):
        yield Change(cluster=_more_workers(scenario, times))
    for times in (2, 4, 8):
        nodes = times * scenario.machines.nodes
        yield Change(nodes=nodes)
        yield Change(nodes=nodes, cluster=_more_workers(scenario, times))


def _one_row(scenario: Scenario, key: str) -> dict[str, int]:
    """The smallest micro-batch, in the key that bounds it now."""
    settings = getattr(scenario.config, key)
    limit = settings.micro_batch_limit()
    if limit.tokens is not None and limit.tokens > scenario.longest_row(key):
        return {f"{key}.max_tokens_per_micro_batch": scenario.longest_row(key)}
    return {f"{key}.micro_batch_size": 1} if limit.tokens is None and limit.rows > 1 else {}


def _splits(scenario: Scenario) -> Iterator[Change]:
    """A higher stage of one role, then of all together. Models that do not learn have only weights to split."""
    for stage in (1, 2, 3):
        able = [
            role
            for role in (*scenario.learners, *(scenario.frozen if stage == 3 else ()))
            if scenario.machines_of(role).num_workers > 1 and scenario.machines_of(role).zero_stage < stage
        ]
        for size in range(1, len(able) + 1):
            for roles in combinations(able, size):
                if stage > 1 or all(scenario.machines_of(role).engine == "deepspeed" for role in roles):
                    yield Change(cluster={f"{role}.zero_stage": stage for role in roles})


def _offloads(scenario: Scenario) -> Iterator[Change]:
    """On GPUs: to the host's memory, which DeepSpeed alone can do."""
    on_gpu = [role for role in scenario.learners if scenario.machines_of(role).gpus_per_worker]
    for offload, least in (("optimizer", 2), ("all", 3)):
        settings = {role: _offload(scenario.machines_of(role), offload, least) for role in on_gpu}
        for size in range(1, len(on_gpu) + 1):
            for roles in combinations(on_gpu, size):
                if all(settings[role] for role in roles):
                    keys = {f"{role}.{name}": value for role in roles for name, value in settings[role].items()}
                    yield Change(cluster=keys)


def _offload(machines: RoleConfig, offload: str, least: int) -> dict[str, Any]:
    """What has to be set for it, nothing where it is set already."""
    wanted = {"engine": "deepspeed", "zero_stage": max(least, machines.zero_stage), "offload": offload}
    if machines.offload in (offload, "all"):
        return {}
    return {name: value for name, value in wanted.items() if getattr(machines, name) != value}


def _lora(config: RunAnyConfig, key: str) -> dict[str, Any]:
    adapter = getattr(config, key).adapter
    kind = {"type": "lora"} if adapter.type in ("half", "pissa") else {}
    return {**kind, "r": adapter.r or LORA_RANK}


def _qlora(config: RunAnyConfig, key: str) -> dict[str, Any]:
    return {**_lora(config, key), "quantization": "nf4"}


def _more_workers(scenario: Scenario, times: int) -> dict[str, Any]:
    """More ranks for the learners, which hold parts of the weights; roles in a learner's process have as many."""
    cluster, learners = scenario.cluster, set(scenario.learners)
    beside = {role for group in cluster.colocate if learners & set(group) for role in group}
    sampled = {role for group in cluster.colocate if "rollout" in group for role in group}
    settings: dict[str, Any] = {}
    for role in (role for role in ROLES if role in (learners | beside) - {"rollout"}):
        settings[f"{role}.num_workers"] = times * getattr(cluster, role).num_workers
        # A sampler that uses the policy's weights needs them whole.
        stage = 2 if role == "policy" and role in sampled else 3
        if (role in learners or role in scenario.frozen) and getattr(cluster, role).zero_stage < stage:
            settings[f"{role}.zero_stage"] = stage
    return settings


def _placed_after(scenario: Scenario, row: Sequence[Change], count: Count) -> Placed | None:
    """None where a config refuses a change of the row."""
    try:
        for change in row:
            scenario = change.of(scenario)
        return place(count(scenario), scenario.machines)
    except ValueError:
        return None


def _row(scenario: Scenario, candidates: Sequence[Change], count: Count) -> list[Change]:
    """Changes one upon the other until it fits, without those it fits without, tried from the largest down."""
    row: list[Change] = []
    for change in candidates:
        placed = _placed_after(scenario, [*row, change], count)
        if placed is None:
            continue
        row.append(change)
        if placed.fits:
            for entry in reversed(list(row)):
                rest = [other for other in row if other is not entry]
                row = rest if fits_after(scenario, rest, count) else row
            return row
    return []

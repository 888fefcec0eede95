"""Changes that would make a run fit, smallest first. Each is placed again by the same arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pydantic import ValidationError

from alignment.config import ROLES, ClusterConfig, Config, PpoRunConfig, RewardModelRunConfig
from alignment.planning.placement import Machines, Placed, place
from alignment.planning.processes import ProcessMemory, Splitting

ConfigT = TypeVar("ConfigT", bound=Config)
RunAnyConfig = PpoRunConfig | RewardModelRunConfig
LORA_RANK = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """A run, its machines' roles, how learners are split, and the machines."""

    config: RunAnyConfig
    cluster: ClusterConfig
    splitting: Splitting
    machines: Machines

    @property
    def learners(self) -> tuple[str, ...]:
        """Where a config keeps what a learner's adapter and micro-batch are."""
        return ("policy", "critic") if isinstance(self.config, PpoRunConfig) else ("training",)

    @property
    def learner_roles(self) -> tuple[str, ...]:
        return ("policy", "critic") if isinstance(self.config, PpoRunConfig) else ("reward_model",)


Count = Callable[[Scenario], list[ProcessMemory]]
Change = Callable[[Scenario], Scenario]


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
    if placed(scenario, count).fits:
        return []
    alone = [words for words, change in changes(scenario) if _fits_after(scenario, [change], count)]
    if alone:
        return alone[:limit]
    row: list[tuple[str, Change]] = []
    for words, change in changes(scenario):
        row.append((words, change))
        if _fits_after(scenario, [change for _, change in row], count):
            return ["all of: " + "; ".join(words for words, _ in _without_idle(scenario, row, count))]
    return []


def placed(scenario: Scenario, count: Count) -> Placed:
    return place(count(scenario), scenario.machines)


def changes(scenario: Scenario) -> Iterator[tuple[str, Change]]:
    """In words and as a change, what is tried: from what leaves the weights alone to what buys machines."""
    config, keys = scenario.config, scenario.learners
    micro = {f"{key}.micro_batch_size": 1 for key in keys if getattr(config, key).micro_batch_size > 1}
    if micro:
        yield _settings(micro)
    if not config.model.gradient_checkpointing:
        yield _settings({"model.gradient_checkpointing": True})
    if any(getattr(scenario.cluster, role).num_workers > 1 for role in scenario.learner_roles):
        for stage in range(scenario.splitting.zero_stage + 1, 4):
            yield f"zero_stage: {stage}", _splitting(zero_stage=stage)
    if not scenario.splitting.offload and any(
        getattr(scenario.cluster, role).gpus_per_worker for role in scenario.learner_roles
    ):
        yield "offload the optimiser to the host's memory", _splitting(offload=True)
    if config.model.dtype == "float32":
        yield _settings({"model.dtype": "bfloat16"})
    if full := [key for key in keys if not getattr(config, key).adapter.r]:
        yield _settings({f"{key}.adapter.r": LORA_RANK for key in full})
    yield _settings({f"{key}.adapter.{name}": value for key in keys for name, value in _qlora(config, key).items()})
    if shared := [role for role in ROLES if 0 < getattr(scenario.cluster, role).gpus_per_worker < 1]:
        yield f"gpus_per_worker: 1 for {', '.join(shared)}", _whole_gpus(shared)
    for times in (2, 4, 8):
        yield f"{times} x num_workers of the learners, zero_stage: 3", _more_workers(scenario, times)
    for times in (2, 4, 8):
        nodes = times * scenario.machines.nodes
        yield f"{nodes} nodes", _more_nodes(nodes)
        yield f"{nodes} nodes, {times} x num_workers of the learners, zero_stage: 3", _wider(scenario, times, nodes)


def _qlora(config: RunAnyConfig, key: str) -> dict[str, Any]:
    return {"r": getattr(config, key).adapter.r or LORA_RANK, "quantization": "nf4"}


def _settings(settings: Mapping[str, Any]) -> tuple[str, Change]:
    words = ", ".join(f"{key}: {str(value).lower()}" for key, value in settings.items())
    return words, lambda scenario: replace(scenario, config=changed(scenario.config, settings))


def _splitting(**settings: Any) -> Change:
    return lambda scenario: replace(scenario, splitting=replace(scenario.splitting, **settings))


def _more_workers(scenario: Scenario, times: int) -> Change:
    """The roles that share a process with a learner have as many."""
    together = {
        role
        for group in scenario.cluster.colocate
        if set(group) & set(scenario.learner_roles)
        for role in group
        if role != "rollout"
    }
    widened = {
        f"{role}.num_workers": times * getattr(scenario.cluster, role).num_workers
        for role in sorted(together | set(scenario.learner_roles))
    }

    def change(other: Scenario) -> Scenario:
        splitting = replace(other.splitting, zero_stage=3)
        return replace(other, cluster=changed(other.cluster, widened), splitting=splitting)

    return change


def _whole_gpus(roles: list[str]) -> Change:
    settings = {f"{role}.gpus_per_worker": 1.0 for role in roles}
    return lambda scenario: replace(scenario, cluster=changed(scenario.cluster, settings))


def _more_nodes(nodes: int) -> Change:
    return lambda scenario: replace(scenario, machines=replace(scenario.machines, nodes=nodes))


def _wider(scenario: Scenario, times: int, nodes: int) -> Change:
    return lambda other: _more_nodes(nodes)(_more_workers(scenario, times)(other))


def _fits_after(scenario: Scenario, row: list[Change], count: Count) -> bool:
    try:
        for change in row:
            scenario = change(scenario)
    except ValidationError:  # the config refuses this change, so it is none
        return False
    return placed(scenario, count).fits


def _without_idle(scenario: Scenario, row: list[tuple[str, Change]], count: Count) -> list[tuple[str, Change]]:
    """The same row without what it fits without, tried from the largest change down."""
    needed = list(row)
    for entry in reversed(row):
        rest = [other for other in needed if other is not entry]
        if _fits_after(scenario, [change for _, change in rest], count):
            needed = rest
    return needed

"""The machines."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator, model_validator

from alignment.config.base import Config, NonNegativeFloat, Positive, PositiveFloat

Placement = Literal["pack", "spread", "strict_pack"]
"""Of processes on nodes: on as few as possible, on as many, or all on one."""


class PlacedConfig(Config):
    """Where the processes of one role go."""

    placement: Placement | None = None
    """`pack` (as few nodes as possible), `spread` (as many) or `strict_pack` (one) for this role's processes by
    themselves; None places them together with all others of the run, as the cluster's own `placement` says."""
    resources: dict[str, PositiveFloat] = {}
    """Custom Ray resources that each process reserves: they pin a role to the nodes that were started with them."""

    @field_validator("resources")
    @classmethod
    def _no_resource_twice(cls, resources: dict[str, float]) -> dict[str, float]:
        if own := sorted({"CPU", "GPU", "memory", "object_store_memory"} & resources.keys()):
            raise ValueError(
                f"got {own}, expected names of custom Ray resources; set cpus_per_worker and gpus_per_worker instead"
            )
        return resources


class RoleConfig(PlacedConfig):
    """The machines of one role."""

    num_workers: Positive = 1
    """Processes: the ranks of a learner, or those that share out a forward pass."""
    cpus_per_worker: PositiveFloat = 0.2
    """CPUs that each reserves; a fraction lets roles share a core in time."""
    gpus_per_worker: NonNegativeFloat = 0.0
    """GPUs that each reserves."""
    threads_per_worker: Positive | None = None
    """Threads of each worker's matrix products; None shares the machine's cores among this role's workers. Part of
    bitwise reproducibility."""
    engine: Literal["torch", "deepspeed"] = "torch"
    """What splits a model over the ranks, where `zero_stage` says so: torch's FSDP2, or DeepSpeed's ZeRO (the extra
    `deepspeed`). Results are the same, and so are checkpoints."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What each worker holds a part of only (Rajbhandari 2020): 0 nothing; 1 optimiser moments and float32 masters; 2
    gradients too; 3 weights too. torch has 0 (DDP), 2 and 3 (FSDP2; 2 keeps a layer whole between its forward and its
    backward). Of a model that does not learn, weights are all there is: 3 splits them, by FSDP2."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What DeepSpeed keeps in host memory while a model learns: masters and moments, or the weights of stage 3 too."""

    @model_validator(mode="after")
    def _engine_can_split(self) -> RoleConfig:
        if self.engine == "torch" and self.zero_stage == 1:
            raise ValueError(
                "zero_stage: got 1 with engine=torch, expected 0, 2 or 3; set zero_stage: 2, or engine: deepspeed"
            )
        least = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        if self.offload != "none" and (self.engine != "deepspeed" or self.zero_stage < least):
            raise ValueError(
                f"offload: got {self.offload} with engine={self.engine} and zero_stage={self.zero_stage}, expected "
                f"engine: deepspeed and zero_stage {least} or more; set them, or offload: none"
            )
        return self


class RolloutRoleConfig(PlacedConfig):
    """The machines of the rollout engines."""

    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """Generation engine, unless the recipe names one; `auto` is vLLM where it is installed."""
    num_engines: Positive = 1
    """Engines, each a process with a copy of the weights. They share out the sequences of a step, and one that dies is
    started again; beside other roles in one process there is one engine. On a CPU also set `threads_per_worker` to
    the cores of each: engines that use every core take turns."""
    min_engines: Positive | None = None
    """Fewest engines, where their number follows the work; None: `num_engines`, with which a run starts."""
    max_engines: Positive | None = None
    """Most engines: one more is started while shares wait, as far as the cluster has room; None: `num_engines`."""
    tensor_parallel_size: Positive = 1
    """GPUs that one engine is split over."""
    cpus_per_worker: PositiveFloat = 0.2
    """CPUs that each engine reserves."""
    gpus_per_worker: NonNegativeFloat = 0.0
    """GPUs that each part of an engine reserves: an engine reserves this times `tensor_parallel_size`."""
    threads_per_worker: Positive | None = None
    """Threads of each engine."""

    weight_route: Literal["auto", "object_store", "cuda_ipc", "broadcast"] = "auto"
    """How weights come from the policy: `cuda_ipc` on one GPU, `broadcast` (NCCL; gloo on CPUs) to GPUs of their own,
    `object_store` everywhere; `auto` takes the shortest that all engines can. Beside the policy nothing travels."""

    @model_validator(mode="after")
    def _route_exists(self) -> RolloutRoleConfig:
        if self.weight_route == "cuda_ipc" and not self.gpus_per_worker:
            raise ValueError(
                "weight_route: got cuda_ipc with gpus_per_worker=0, expected a GPU that policy and engines share; "
                "set gpus_per_worker, or weight_route: auto"
            )
        if self.weight_route == "broadcast" and not self.gpus_per_worker and self.threads_per_worker is None:
            raise ValueError(
                "weight_route: got broadcast between CPUs without threads_per_worker, expected it set: processes "
                "that use every core take turns, and a broadcast needs all at once; set it, or weight_route: auto"
            )
        return self

    @model_validator(mode="after")
    def _engine_can_split(self) -> RolloutRoleConfig:
        if self.tensor_parallel_size != 1 and self.engine == "transformers":
            raise ValueError(
                f"got tensor_parallel_size={self.tensor_parallel_size}, expected 1: the transformers engine runs on "
                "one GPU; raise num_engines instead"
            )
        if self.tensor_parallel_size != 1 and self.gpus_per_worker != 1:
            raise ValueError(
                f"got tensor_parallel_size={self.tensor_parallel_size}, expected 1 with "
                f"gpus_per_worker={self.gpus_per_worker:g}: an engine is split over whole GPUs; set "
                "gpus_per_worker: 1, or raise num_engines instead"
            )
        return self

    @model_validator(mode="after")
    def _starts_within_limits(self) -> RolloutRoleConfig:
        least, most = self.engine_limits
        if not least <= self.num_engines <= most:
            raise ValueError(
                f"min_engines, num_engines, max_engines: got {least}, {self.num_engines}, {most}, expected them in "
                "ascending order; num_engines is how many a run starts with"
            )
        return self

    @property
    def num_workers(self) -> int:
        return self.num_engines

    @property
    def engine_limits(self) -> tuple[int, int]:
        """Fewest and most engines; equal where their number is fixed."""
        return self.min_engines or self.num_engines, self.max_engines or self.num_engines


LEARNERS_AND_SCORERS = ("policy", "critic", "reference", "reward_model")
ROLES = (*LEARNERS_AND_SCORERS, "rollout")


class ClusterConfig(Config):
    """The machines: the only file to edit to scale a run.

    Learners and scorers that share their processes (`colocate`) have the same number of workers and GPUs: in the YAML
    it is enough to give them for one.
    """

    policy: RoleConfig = RoleConfig()
    """The model that learns."""
    critic: RoleConfig = RoleConfig()
    """The value model."""
    reference: RoleConfig = RoleConfig()
    """The frozen policy."""
    reward_model: RoleConfig = RoleConfig()
    """What scores."""
    rollout: RolloutRoleConfig = RolloutRoleConfig()
    """What samples."""
    colocate: tuple[tuple[str, ...], ...] = (("policy", "reference"),)
    """Groups of roles that live in one process and share what they can: with LoRA the reference is the policy with
    its adapters off; policy and rollout share one copy of the weights."""
    placement: Placement = "pack"
    """How the processes of all roles go to nodes: `pack` (as few as possible), `spread` (as many) or `strict_pack`
    (one). A role with a `placement` of its own is left out."""
    placement_timeout: PositiveFloat = 10.0
    """Seconds to wait for the machines before giving up; longer where nodes are still to join."""

    @model_validator(mode="before")
    @classmethod
    def _follow_the_group(cls, given: Any) -> Any:
        """What is no group or no role as it stands is left to the checks of the fields."""
        groups = given.get("colocate", cls.model_fields["colocate"].default) if isinstance(given, dict) else None
        if not isinstance(groups, list | tuple):
            return given
        # Behind such a validator the fields' own checks are those of Python values: tuples, not JSON's lists.
        groups = tuple(tuple(group) if isinstance(group, list) else group for group in groups)
        given = {**given, "colocate": groups}
        for group in groups:
            roles = [role for role in LEARNERS_AND_SCORERS if isinstance(group, tuple) and role in group]
            settings = {role: given.get(role, {}) for role in roles}
            for key in ("num_workers", "gpus_per_worker"):
                said = [one[key] for one in settings.values() if isinstance(one, dict) and _is_count(one.get(key))]
                for role, one in settings.items():
                    if said and isinstance(one, dict):
                        given[role] = settings[role] = {key: said[0], **one}
        return given

    @model_validator(mode="after")
    def _colocate_names_roles(self) -> ClusterConfig:
        named = [role for group in self.colocate for role in group]
        if unknown := sorted(set(named) - set(ROLES)):
            raise ValueError(f"colocate: got {unknown[0]!r}, expected some of {', '.join(ROLES)}; correct its name")
        if len(named) != len(set(named)) or () in self.colocate:
            raise ValueError(
                f"colocate: got {[list(group) for group in self.colocate]}, expected groups of roles, each role at "
                "most once; correct the groups"
            )
        for group in self.colocate:
            if "rollout" in group and len(group) > 1 and (most := self.rollout.engine_limits[1]) > 1:
                key = "num_engines" if self.rollout.num_engines > 1 else "max_engines"
                raise ValueError(
                    f"rollout.{key}: got {most} with rollout in the group {group} of "
                    "colocate, expected 1: an engine that shares a process with other roles is one; take rollout out "
                    f"of the group, or set {key}: 1"
                )
            if len({getattr(self, role).placement for role in group} - {None}) > 1:
                raise ValueError(
                    f"colocate: got different placements in {group}, which is one group of processes, expected one; "
                    "set placement for one of its roles alone"
                )
            if "rollout" in group and "policy" in group and self.policy.zero_stage == 3:
                raise ValueError(
                    f"policy.zero_stage: got 3 with rollout in the group {group} of colocate, expected at most 2: an "
                    "engine that uses the policy's own weights needs them whole; take rollout out of the group"
                )
            settings = [getattr(self, role) for role in group]
            if settings[0].num_workers > 1 and len({one.gpus_per_worker > 0 for one in settings}) > 1:
                raise ValueError(
                    f"colocate: got some roles of {group} with GPUs and some without, expected all or none: "
                    "the ranks of a process talk over NCCL or over gloo; set gpus_per_worker for all, or separate them"
                )
            if len({one.num_workers for one in settings}) > 1:
                numbers = ", ".join(f"{role} {one.num_workers}" for role, one in zip(group, settings, strict=True))
                raise ValueError(
                    f"num_workers: got {numbers} of roles that share a process (colocate), expected one number; align "
                    "them, or separate the roles, all of them with colocate: []"
                )
        return self


def _is_count(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0

"""From a run's config and a cluster's to running roles: the builder that unpacks both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.critic import CriticActor
from actors.engines import choose_engine
from actors.handles import (
    CriticHandle,
    Group,
    PolicyHandle,
    PreferenceHandle,
    ReferenceHandle,
    RewardHandle,
    RewardTrainingHandle,
    RolloutHandle,
    SftHandle,
)
from actors.policy import PolicyActor
from actors.preference_training import DpoActor, KtoActor
from actors.reference import ReferenceActor
from actors.reward import RewardModelActor
from actors.reward_training import RewardTrainingActor
from actors.rollout import RolloutActor
from actors.sft import SftActor
from actors.weight_links import RouteChoice
from actors.worker import Actor, choose_device
from alignment.config import (
    AdapterConfig,
    ClusterConfig,
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
from alignment.config.preference import ReferenceConfig
from alignment.types import SftExample


@dataclass(frozen=True, kw_only=True, slots=True)
class RankRoles:
    """What `answer_prompts` is handed."""

    reward: RewardHandle
    rollout: RolloutHandle


@dataclass(frozen=True, kw_only=True, slots=True)
class IterativeRoles:
    """What `train_in_rounds` is handed."""

    policy: PreferenceHandle
    reward: RewardHandle
    rollout: RolloutHandle


@dataclass(frozen=True, kw_only=True, slots=True)
class PpoRoles:
    """What `train_ppo` is handed."""

    policy: PolicyHandle
    critic: CriticHandle
    reference: ReferenceHandle
    reward: RewardHandle
    rollout: RolloutHandle


def ppo_actors(config: PpoRunConfig, cluster: ClusterConfig, *, model_path: str, critic_path: str) -> dict[str, Actor]:
    """The five actors of a PPO run, not yet set up. `model_path` and `critic_path` are folders or hub names."""
    sequences = config.ppo.rollout_batch_size * config.ppo.num_samples_per_prompt
    updates_per_step = config.ppo.ppo_epochs * (sequences // config.ppo.minibatch_size)
    policy_steps = config.run.num_steps - config.critic.warmup_steps
    return {
        "policy": PolicyActor(
            model_path=model_path,
            policy=config.policy,
            ppo=config.ppo,
            temperature=config.rollout.temperature,
            correction=config.rollout.correction,
            logprob_gap_limit=config.logprob_gap_limit,
            total_updates=policy_steps * updates_per_step,
            device=choose_device(cluster.policy.gpus_per_worker),
            machines=cluster.policy,
            model=config.model,
            seed=config.run.seed,
        ),
        "critic": CriticActor(
            model_path=critic_path,
            critic=config.critic,
            ppo=config.ppo,
            total_updates=config.run.num_steps * updates_per_step,
            device=choose_device(cluster.critic.gpus_per_worker),
            machines=cluster.critic,
            model=config.model.at(config.critic.path or config.model.path, config.critic.revision),
            seed=config.run.seed,
        ),
        "reference": ReferenceActor(
            model_path=model_path,
            model=config.model,
            temperature=config.rollout.temperature,
            # The policy's own: the same shapes give the same bits, so the first KL is exactly 0.
            micro_batch_limit=config.policy.micro_batch_limit(),
            quantization=config.policy.adapter.quantization,
            device=choose_device(cluster.reference.gpus_per_worker),
            machines=cluster.reference,
        ),
        **_answering_actors(
            config, cluster, model_path=model_path, adapter=config.policy.adapter, seed=config.run.seed
        ),
    }


def rank_actors(config: RankRunConfig, cluster: ClusterConfig, *, model_path: str) -> dict[str, Actor]:
    """The two actors of a ranking run, not yet set up: a sampler without a policy that could send it weights."""
    return _answering_actors(config, cluster, model_path=model_path, adapter=None, seed=config.run.seed)


def _answering_actors(
    config: PpoRunConfig | RankedRunConfig,
    cluster: ClusterConfig,
    *,
    model_path: str,
    adapter: AdapterConfig | None,
    seed: int,
) -> dict[str, Actor]:
    """What answers and what scores. `adapter`: the policy's, whose weights the sampler is sent."""
    return {
        "reward_model": RewardModelActor(
            model=config.model,
            reward=config.reward,
            device=choose_device(cluster.reward_model.gpus_per_worker),
            machines=cluster.reward_model,
        ),
        "rollout": RolloutActor(
            model_path=model_path,
            rollout=config.rollout,
            engine=choose_engine(config.rollout.engine, cluster.rollout.engine),
            tensor_parallel_size=cluster.rollout.tensor_parallel_size,
            adapter=adapter,
            longest=config.data.max_prompt_tokens + config.rollout.max_new_tokens,
            device=choose_device(cluster.rollout.gpus_per_worker),
            model=config.model,
            seed=seed,
        ),
    }


def reward_training_actors(
    config: RewardModelRunConfig, cluster: ClusterConfig, *, model_path: str
) -> dict[str, Actor]:
    return {
        "reward_model": RewardTrainingActor(
            model_path=model_path,
            model=config.model,
            training=config.training,
            total_updates=config.run.num_steps,
            seed=config.run.seed,
            device=choose_device(cluster.reward_model.gpus_per_worker),
            machines=cluster.reward_model,
        )
    }


def sft_actors(
    config: SftRunConfig, cluster: ClusterConfig, *, model_path: str, calibration: Sequence[SftExample] = ()
) -> dict[str, Actor]:
    """The one actor of a supervised run, not yet set up. `calibration` are `training.calibration_examples`."""
    return {
        "policy": SftActor(
            model_path=model_path,
            model=config.model,
            training=config.training,
            total_updates=config.run.num_steps,
            seed=config.run.seed,
            device=choose_device(cluster.policy.gpus_per_worker),
            machines=cluster.policy,
            calibration=calibration,
        )
    }


def dpo_actors(config: DpoRunConfig | LiveRunConfig, cluster: ClusterConfig, *, model_path: str) -> dict[str, Actor]:
    """The one actor of a run on pairs, not yet set up."""
    return {"policy": DpoActor(dpo=config.dpo, **_preference_settings(config, cluster, model_path))}


def kto_actors(config: KtoRunConfig, cluster: ClusterConfig, *, model_path: str) -> dict[str, Actor]:
    """The one actor of a run on labels, not yet set up."""
    return {"policy": KtoActor(kto=config.kto, **_preference_settings(config, cluster, model_path))}


def iterative_actors(config: IterativeRunConfig, cluster: ClusterConfig, *, model_path: str) -> dict[str, Actor]:
    """The three actors of a run in rounds, not yet set up: what learns from pairs, what answers and what scores."""
    settings = {**_preference_settings(config, cluster, model_path), "reference": ReferenceConfig()}
    return {
        "policy": DpoActor(dpo=config.dpo, **settings),
        **_answering_actors(
            config, cluster, model_path=model_path, adapter=config.training.adapter, seed=config.run.seed
        ),
    }


def _preference_settings(
    config: DpoRunConfig | KtoRunConfig | LiveRunConfig | IterativeRunConfig, cluster: ClusterConfig, path: str
) -> dict[str, Any]:
    return {
        "reference": config.reference,
        "model_path": path,
        "model": config.model,
        "training": config.training,
        "total_updates": config.run.num_steps,
        "seed": config.run.seed,
        "device": choose_device(cluster.policy.gpus_per_worker),
        "machines": cluster.policy,
    }


def ppo_roles(
    groups: Mapping[str, Group],
    *,
    weight_route: RouteChoice = "auto",
    engine_limits: tuple[int, int] | None = None,
) -> PpoRoles:
    return PpoRoles(
        policy=PolicyHandle(groups["policy"], weight_route),
        critic=CriticHandle(groups["critic"]),
        reference=ReferenceHandle(groups["reference"]),
        reward=RewardHandle(groups["reward_model"]),
        rollout=RolloutHandle(groups["rollout"], engine_limits),
    )


def iterative_roles(
    groups: Mapping[str, Group],
    *,
    weight_route: RouteChoice = "auto",
    engine_limits: tuple[int, int] | None = None,
) -> IterativeRoles:
    return IterativeRoles(
        policy=PreferenceHandle(groups["policy"], weight_route),
        reward=RewardHandle(groups["reward_model"]),
        rollout=RolloutHandle(groups["rollout"], engine_limits),
    )


def rank_roles(groups: Mapping[str, Group], *, engine_limits: tuple[int, int] | None = None) -> RankRoles:
    return RankRoles(
        reward=RewardHandle(groups["reward_model"]), rollout=RolloutHandle(groups["rollout"], engine_limits)
    )


def sft_role(groups: Mapping[str, Group]) -> SftHandle:
    return SftHandle(groups["policy"])


def preference_role(groups: Mapping[str, Group]) -> PreferenceHandle:
    return PreferenceHandle(groups["policy"])


def reward_training_role(groups: Mapping[str, Group]) -> RewardTrainingHandle:
    return RewardTrainingHandle(groups["reward_model"])

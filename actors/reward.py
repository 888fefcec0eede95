"""What scores an answer: the reward model and the rule functions, weighted and added, every part kept.

Gold functions are asked with them, and their numbers kept beside the total.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from actors.hosted_model import HostedModel, scales_of
from actors.worker import WHOLE, Actor
from alignment.config import ModelConfig, RewardConfig
from alignment.config.cluster import RoleConfig
from alignment.config.reward import GOLD, MODEL_PART
from alignment.ensembles import score_ensemble
from alignment.scores import combine
from alignment.types import Rollout, Score
from rewards.base import Part, check_settings, check_time_limit, load_function, refuse_reserved, with_defaults
from rewards.pool import PoolFunction, RewardPool

TOO_LONG = "length: longer than the positions of"


class RewardModelActor(Actor):
    """Scores rollouts. Text goes in: the reward model may have another tokenizer and template than the policy."""

    role = "reward_model"
    pool: RewardPool | None = None

    def __init__(
        self, *, model: ModelConfig, reward: RewardConfig, device: str = "cpu", machines: RoleConfig = WHOLE
    ) -> None:
        self.model_config, self.config, self.device, self.machines = model, reward, device, machines

    def setup(self, peers: Mapping[str, Actor]) -> None:
        if self.config.functions or self.config.gold:
            execution = self.config.execution
            self.pool = RewardPool(
                pool_functions(self.config), num_workers=execution.num_workers, memory_mb=execution.memory_mb
            )
            self.pool.start()
        paths = self.config.models
        scales = scales_of(paths, standardize=self.config.standardize_model)
        self.models = [
            HostedModel(
                self.model_config.at(path, self.config.revision if path == self.config.model else None),
                scale=scale,
                device=self.device,
                lockstep=self.lockstep,
            )
            for path, scale in zip(paths, scales, strict=True)
        ]

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """One `Score` per rollout, in order."""
        if not rollouts:  # of a model that is split over several processes, this one has nothing to score
            self._members(rollouts)
            return []
        responses = [rollout.response for rollout in rollouts]
        prompts = [rollout.prompt.messages[-1]["content"] for rollout in rollouts]
        # The functions are at work while the model is.
        scoring = self.pool.score(prompts, responses, _columns(rollouts)) if self.pool is not None else None
        said: dict[str, Part] = {}
        members = self._members(rollouts)
        disagreement: Sequence[float | None] = [None] * len(rollouts)
        if members:
            said[MODEL_PART], disagreement = self._model_part(members)
        if scoring is not None:
            said |= scoring.result()
        gold = {one.key: said[one.key].numbers for one in self.config.gold}
        totals, breakdowns = combine(
            {name: part.numbers for name, part in said.items() if name not in gold},
            self.config.weights,
            clips=self.config.clips,
            gates=self.config.gates,
            num_responses=len(rollouts),
        )
        own = {f"{MODEL_PART}/{k}": numbers for k, numbers in enumerate(members)} if len(members) > 1 else {}
        # What it took belongs to the call: the first answer carries it, so that it is added up once.
        counts = {f"{name}/{what}": count for name, part in said.items() for what, count in part.counts.items()}
        return [
            Score(
                total=total,
                parts={**breakdown, **{name: numbers[i] for name, numbers in (own | gold).items()}},
                failures={name: part.failures[i] for name, part in said.items() if i in part.failures},
                disagreement=disagreement[i] if own else None,
                counts=counts if i == 0 else {},
            )
            for i, (total, breakdown) in enumerate(zip(totals, breakdowns, strict=True))
        ]

    def close(self) -> None:
        if self.pool is not None:
            self.pool.close()
            self.pool = None

    def _members(self, rollouts: Sequence[Rollout]) -> list[list[float | None]]:
        """Every model's own scores, one model after the other."""
        return [model.score(rollouts, limit_of=self.config.micro_batch_limit) for model in self.models]

    def _model_part(self, members: Sequence[Sequence[float | None]]) -> tuple[Part, list[float | None]]:
        """The models' scores as one part, and how far they disagree. One alone is itself."""
        ensemble = self.config.ensemble
        found = score_ensemble(members, how=ensemble.how, std_coef=ensemble.std_coef)
        failures = {}
        for i, number in enumerate(found.scores):
            if number is None:
                short = [path for path, one in zip(self.config.models, members, strict=True) if one[i] is None]
                failures[i] = f"{TOO_LONG} {', '.join(short)}"
        return Part(found.scores, failures), found.disagreement


def pool_functions(reward: RewardConfig) -> dict[str, PoolFunction]:
    """The functions of a config by their parts, gold ones too, as the processes run them.

    Raises:
        ValueError: one that does not exist, or whose settings or time limit cannot be; a gold one that is trained on.
    """
    execution, functions = reward.execution, {}
    for one in (*reward.functions, *reward.gold):
        key = "reward.gold" if one.key.startswith(GOLD) else "reward.functions"
        function, settings = load_function(one.name), one.settings
        limit = one.time_limit or execution.time_limit
        samples = one.samples_per_call or execution.samples_per_call
        check_settings(one.name, function, settings, key=key)
        check_time_limit(one.name, function, settings, time_limit=limit, samples_per_call=samples, key=key)
        functions[one.key] = PoolFunction(name=one.name, settings=settings, time_limit=limit, samples_per_call=samples)
    trained = [(one.name, with_defaults(load_function(one.name), one.settings)) for one in reward.functions]
    for one in reward.gold:
        if (one.name, with_defaults(load_function(one.name), one.settings)) in trained:
            raise ValueError(
                f"reward.gold: got {one.name} with settings that it has in reward.functions too, expected a rule that "
                "is not trained on: what is optimised measures nothing; remove one of the two, or change its settings"
            )
    return functions


def _columns(rollouts: Sequence[Rollout]) -> dict[str, list[object]]:
    """Extra data columns as lists, plus what the run knows: `rewards.base.SAMPLED`."""
    names = dict.fromkeys(name for rollout in rollouts for name in rollout.prompt.columns)
    refuse_reserved(names)
    columns: dict[str, list[object]] = {name: [r.prompt.columns.get(name) for r in rollouts] for name in names}
    columns["finish_reasons"] = [rollout.finish_reason for rollout in rollouts]
    columns["lengths"] = [len(rollout.response_ids) for rollout in rollouts]
    columns["prompt_messages"] = [[dict(message) for message in rollout.prompt.messages] for rollout in rollouts]
    return columns

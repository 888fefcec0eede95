"""PPO with a critic, and the same with one forward of each model a step. Another schedule is another function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignment.config import PpoRunConfig
from alignment.data.prompts import prompts_for_step
from alignment.experience import make_experience, reward_rows
from alignment.hacking import HackingWatch
from alignment.interfaces import Generator, LogprobWorker, Metrics, PolicyWorker, Scorer, ValueWorker
from alignment.kl import AdaptiveKLController
from alignment.loops.invariants import check_first_step
from alignment.loops.run import Run, StepLog
from alignment.rollout_correction import MISMATCH_METRICS, require_current, require_match
from alignment.scores import (
    ScoreNormalizer,
    clip_metrics,
    normalize_parts,
    refuse_unscorable,
    score_metrics,
    shape_scores,
)
from alignment.types import Experience, Prompt, Rollout, Score


@dataclass(slots=True)
class PpoState:
    """What the loop itself remembers between steps; the models remember the rest."""

    step: int
    """The next step."""
    kl_coef: AdaptiveKLController
    normalizer: ScoreNormalizer
    """Of the total."""
    parts: dict[str, ScoreNormalizer]
    """Of the parts that are normalised."""
    hacking: HackingWatch

    @classmethod
    def start(cls, config: PpoRunConfig) -> PpoState:
        # With no target the controller is never updated and the coefficient stays.
        target = config.kl.target if config.kl.target is not None else 1.0
        kl_coef = AdaptiveKLController(config.kl.coef, target, config.kl.horizon)
        parts = {name: ScoreNormalizer() for name in config.reward.normalized}
        return cls(0, kl_coef, ScoreNormalizer(), parts, HackingWatch(**hacking_settings(config)))

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "kl_coef": self.kl_coef.state_dict(),
            "normalizer": self.normalizer.state_dict(),
            "parts": {name: normalizer.state_dict() for name, normalizer in self.parts.items()},
            "hacking": self.hacking.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.kl_coef.load_state_dict(state["kl_coef"])
        self.normalizer.load_state_dict(state["normalizer"])
        for name, normalizer in self.parts.items():
            normalizer.load_state_dict(state["parts"][name])
        self.hacking.load_state_dict(state["hacking"])


def train_ppo(
    config: PpoRunConfig,
    prompts: Sequence[Prompt],
    *,
    policy: PolicyWorker,
    critic: ValueWorker,
    reference: LogprobWorker,
    reward: Scorer,
    rollout: Generator,
    run: Run,
    state: PpoState,
) -> None:
    """Sample, score, shape, update, send the new weights; every completed step is on disk before the next starts."""
    for step in range(state.step, config.run.num_steps):
        log, rollouts = sample_step(config, prompts, step, rollout=rollout, run=run)

        with log.phase("score"):  # four forwards side by side
            scoring, old = reward.score(rollouts), policy.logprobs(rollouts)
            ref, values = reference.logprobs(rollouts), critic.values(rollouts)
            scores = scoring.result()
            shaped, clipped = shaped_scores(config, state, scores, rollouts)
            experience, described = experience_of(
                config, state, rollouts, shaped, old.result(), ref.result(), values.result()
            )
            log.metrics.update({**score_metrics(scores), **clipped, **described})
        if step == 0:
            require_first_step(config, policy, experience, log.metrics, run)
        require_match(log.metrics, config.logprob_gap_limit, step=step)

        with log.phase("update"):
            updates = [critic.update(experience, step=step)]
            if step >= config.critic.warmup_steps:
                updates.append(policy.update(experience, step=step))
            for update in updates:
                log.metrics.update(update.result())

        finish_step(config, state, log, rollouts, scores, policy=policy, critic=critic, rollout=rollout, run=run)


def train_ppo_one_pass(
    config: PpoRunConfig,
    prompts: Sequence[Prompt],
    *,
    policy: PolicyWorker,
    critic: ValueWorker,
    reference: LogprobWorker,
    reward: Scorer,
    rollout: Generator,
    run: Run,
    state: PpoState,
) -> None:
    """`train_ppo` for one update per step: the forward of each update is also the one that would have come before it.

    The KL in the rewards reads the sampler's log-probabilities; the ratio's old policy is the trainer's own forward.
    It also measures the gap to the sampler: after the critic's step, and before the policy's.
    """
    for step in range(state.step, config.run.num_steps):
        log, rollouts = sample_step(config, prompts, step, rollout=rollout, run=run)

        with log.phase("score"):
            scoring, pending = reward.score(rollouts), reference.logprobs(rollouts)
            scores, ref = scoring.result(), pending.result()
        shaped, clipped = shaped_scores(config, state, scores, rollouts)
        sampled = [torch.tensor(rollout.rollout_logprobs) for rollout in rollouts]
        if step == 0:
            old, values = policy.logprobs(rollouts).result(), critic.values(rollouts).result()
            experience, described = experience_of(config, state, rollouts, shaped, old, ref, values)
            log.metrics.update(described)
            require_first_step(config, policy, experience, log.metrics, run)

        with log.phase("update"):
            rewards, learn = reward_rows(rollouts, shaped, sampled, ref, **reward_settings(config, state))
            rows = [numbers[where] for numbers, where in zip(rewards, learn, strict=True)]
            values, fitted = critic.fit(
                rollouts, rows, step=step, gamma=config.ppo.gamma, gae_lambda=config.ppo.gae_lambda
            ).result()
            policy_learns = step >= config.critic.warmup_steps
            old = sampled if policy_learns else policy.logprobs(rollouts).result()
            experience, described = experience_of(config, state, rollouts, shaped, old, ref, values)
            if policy_learns:  # its own forward measures the mismatch: here the sampler meets itself
                known = {name: value for name, value in described.items() if name not in MISMATCH_METRICS}
                described = {**known, **policy.update_on_policy(experience, step=step).result()}
            else:
                require_match(described, config.logprob_gap_limit, step=step)
            log.metrics.update({**score_metrics(scores), **clipped, **described, **fitted})

        finish_step(config, state, log, rollouts, scores, policy=policy, critic=critic, rollout=rollout, run=run)


def sample_step(
    config: PpoRunConfig, prompts: Sequence[Prompt], step: int, *, rollout: Generator, run: Run
) -> tuple[StepLog, list[Rollout]]:
    """Open the step and answer its prompts."""
    log = run.begin_step(step)
    batch = prompts_for_step(prompts, step, batch_size=config.ppo.rollout_batch_size, seed=config.run.seed)
    with log.phase("generate"):
        rollouts = rollout.generate(batch, step=step, num_samples=config.ppo.num_samples_per_prompt).result()
    require_current(rollouts, version=step)
    return log, rollouts


def require_first_step(
    config: PpoRunConfig, policy: PolicyWorker, experience: Experience, metrics: Metrics, run: Run
) -> None:
    """Stop before the first update unless every invariant holds."""
    run.require(check_first_step(config, policy.check(experience).result(), metrics, run.eos_is_trained))


def finish_step(
    config: PpoRunConfig,
    state: PpoState,
    log: StepLog,
    rollouts: Sequence[Rollout],
    scores: Sequence[Score],
    *,
    policy: PolicyWorker,
    critic: ValueWorker,
    rollout: Generator,
    run: Run,
) -> None:
    """Send the new weights, move the KL weight, write the step down, and commit it."""
    with log.phase("sync"):
        # The answer is the version that every engine has proved to compute with.
        log.metrics["rollout/weight_version"] = float(policy.send_weights(rollout, version=log.step + 1).result())
    log.metrics.update(rollout.metrics())
    state.step = log.step + 1
    kl = log.metrics.get("kl/per_sequence")  # missing when no answer of the step has a score
    if config.kl.target is not None and kl is not None:
        state.kl_coef.update(kl, len(rollouts))
    begun = state.hacking.observe(log.metrics, len(rollouts))
    log.metrics.update(state.hacking.metrics())
    run.finish_step(log, rollouts, scores)
    for sign in begun:
        run.progress.message(f"WARNING  step {log.step}: {state.hacking.holding[sign]}; see docs/reward_hacking.md")
    # The KL is that of the weights before this step's update; the update, which goes on from there, is not committed.
    stop_on_blow_up(kl, config.kl.limit, log.step)
    stop_on_signs(state.hacking, begun, config.hacking.stop_on, log.step)
    run.checkpoint(state.step, {"policy": policy, "critic": critic}, state.state_dict())


def shaped_scores(
    config: PpoRunConfig, state: PpoState, scores: Sequence[Score], rollouts: Sequence[Rollout]
) -> tuple[list[float | None], dict[str, float]]:
    """Unpack the reward config; refuse a batch with more unscored answers than the budget.

    Returns the scores, and what to log about the clips.
    """
    reward = config.reward
    refuse_unscorable(rollouts, scores, reward.max_unscorable)
    if state.parts:
        scores = normalize_parts(scores, state.parts, reward.weights, clips=reward.clips, gates=reward.gates)
    normalizer = state.normalizer if reward.normalize else None
    shaped = shape_scores(
        rollouts,
        scores,
        max_new_tokens=config.rollout.max_new_tokens,
        missing_eos_penalty=reward.missing_eos_penalty,
        overlong_buffer=reward.overlong_buffer,
        overlong_penalty=reward.overlong_penalty,
        clip=reward.clip,
        normalizer=normalizer,
    )
    return shaped, clip_metrics(
        scores, clip=reward.clip, clips=reward.clips, normalizer=normalizer, normalizers=state.parts
    )


def reward_settings(config: PpoRunConfig, state: PpoState) -> dict[str, Any]:
    """What `reward_rows` takes from the configs and the controller."""
    return {
        "kl_coef": state.kl_coef.value,
        "kl_estimator": config.kl.estimator,
        "whiten_rewards": config.ppo.whiten_rewards,
    }


def hacking_settings(config: PpoRunConfig) -> dict[str, Any]:
    """What `HackingWatch` takes from the configs."""
    return {"gold": [one.key for one in config.reward.gold], **config.hacking.model_dump(exclude={"stop_on"})}


def experience_of(
    config: PpoRunConfig,
    state: PpoState,
    rollouts: Sequence[Rollout],
    shaped: Sequence[float | None],
    old: Sequence[Tensor],
    ref: Sequence[Tensor],
    values: Sequence[Tensor],
) -> tuple[Experience, dict[str, float]]:
    """The experience of one step, and what to log about it."""
    experience, described = make_experience(
        rollouts,
        shaped,
        old,
        ref,
        values,
        gamma=config.ppo.gamma,
        gae_lambda=config.ppo.gae_lambda,
        whiten_advantages=config.ppo.whiten_advantages,
        **reward_settings(config, state),
    )
    return experience, {**described, "kl/coef": state.kl_coef.value}


def stop_on_blow_up(kl: float | None, limit: float | None, step: int) -> None:
    """End the run when the policy has left the reference further behind than the user allows, as far as is known."""
    if limit is not None and kl is not None and not kl <= limit:  # NaN counts as too far
        raise RuntimeError(
            f"step {step}: got a KL of {kl:.2f} per sequence to the reference, expected at most kl.limit={limit:g}; "
            "with a new --output-dir raise kl.coef or lower policy.optimizer.lr, or --resume from an earlier step"
        )


def stop_on_signs(watch: HackingWatch, begun: Sequence[str], stop_on: Sequence[str], step: int) -> None:
    """End the run at a sign of an exploited reward that the user wants it to end at."""
    if fatal := [sign for sign in begun if sign in stop_on]:
        raise RuntimeError(
            f"step {step}: {watch.holding[fatal[0]]}, expected no {fatal[0]} with hacking.stop_on; with a new "
            "--output-dir change the reward or raise kl.coef, or take the sign out of hacking.stop_on"
        )

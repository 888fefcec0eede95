"""The PPO stage."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from alignment.config.base import Config, Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat
from alignment.config.data import PromptDataConfig
from alignment.config.hacking import HackingConfig
from alignment.config.model import (
    AdapterConfig,
    MicroBatchConfig,
    ModelConfig,
    OptimizerConfig,
    refuse_adapter_for_model,
    refuse_adaptive_rate,
    refuse_float16_training,
    refuse_small_budget,
    refuse_unmergeable,
)
from alignment.config.reward import RewardConfig
from alignment.config.rollout import RolloutConfig, refuse_adapter_on_other_base
from alignment.config.run import EvaluationConfig, RunConfig
from alignment.kl_controller import check_horizon


class PolicyConfig(MicroBatchConfig):
    """The model that learns. Its reference has the same micro-batches."""

    adapter: AdapterConfig = AdapterConfig()
    """What is trained of it: everything, or a part that can be merged into weights."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Its optimiser."""


class CriticConfig(MicroBatchConfig):
    """The value model: the same backbone with a scalar head that starts at zero."""

    path: str | None = None
    """Backbone; None takes the policy's."""
    revision: str | None = None
    """Commit hash of a hub model; None takes model.revision where this is the same repository."""
    adapter: AdapterConfig = AdapterConfig()
    """What is trained of it; the head always is."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=2e-5)
    """Its optimiser."""
    warmup_steps: NonNegative = 0
    """First steps in which the critic learns and the policy does not."""

    @model_validator(mode="after")
    def _rate_is_its_own(self) -> CriticConfig:
        refuse_adaptive_rate(self.optimizer, "critic.optimizer")
        return self


class KlConfig(Config):
    """The penalty that ties the policy to the reference."""

    coef: NonNegativeFloat = 0.05
    """Weight of the per-token penalty in the reward."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """k1 gives the true policy gradient of the reverse KL (Schulman 2020)."""
    target: PositiveFloat | None = None
    """KL per sequence for the adaptive controller; None keeps `coef` fixed."""
    horizon: PositiveFloat = 10_000.0
    """Sequences over which the controller acts: more than 0.2 of a step's."""
    limit: PositiveFloat | None = None
    """KL per sequence over which the run stops, naming it; None never stops."""

    @model_validator(mode="after")
    def _controller_can_steer(self) -> KlConfig:
        if self.target is not None and not self.coef:
            raise ValueError(
                f"kl.coef: got 0 with kl.target={self.target:g}, expected more than 0: the controller multiplies it; "
                "raise it, or set kl.target to null"
            )
        return self


class PpoConfig(Config):
    """The PPO update (Schulman 2017)."""

    rollout_batch_size: Positive = 16
    """Prompts per step."""
    num_samples_per_prompt: Positive = 1
    """Responses per prompt; sequences per step = prompts x samples."""
    minibatch_size: Positive = 16
    """Sequences per optimiser step."""
    ppo_epochs: Positive = 1
    """Passes over one batch."""
    clip_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Lower (and upper) clip of the importance ratio."""
    clip_ratio_high: Annotated[float, Field(gt=0)] | None = None
    """Upper clip, when it differs."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound on the loss for negative advantages (Ye 2020); None switches it off."""
    value_clip: PositiveFloat | None = 0.2
    """Clip of the value change; None switches it off."""
    vf_coef: NonNegativeFloat = 1.0
    """Factor of the value loss; the critic is a model of its own, so it scales its rate."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    one_pass: bool = False
    """One forward of each model per step: the policy's and the critic's updates reuse it. Needs one epoch over one
    minibatch. The KL in the rewards reads the sampler's log-probabilities, so the result is the same to rounding."""
    gamma: Fraction = 1.0
    """Discount."""
    gae_lambda: Fraction = 0.95
    """Lambda of generalised advantage estimation."""
    whiten_advantages: bool = True
    """Over the global batch."""
    whiten_rewards: bool = False
    """Scale shaped rewards to unit variance, keeping their mean."""
    kl_stop: PositiveFloat | None = None
    """KL per token between old and new policy that ends an update early."""


class PpoRunConfig(Config):
    """Everything of a PPO run but the machines."""

    run: RunConfig = RunConfig()
    """The run itself."""
    data: PromptDataConfig = PromptDataConfig()
    """Prompts."""
    model: ModelConfig = ModelConfig()
    """Policy, reference and rollout model."""
    policy: PolicyConfig = PolicyConfig()
    """What is trained, and how."""
    critic: CriticConfig = CriticConfig()
    """The value model."""
    rollout: RolloutConfig = RolloutConfig()
    """Sampling."""
    reward: RewardConfig
    """Scores."""
    kl: KlConfig = KlConfig()
    """Penalty to the reference."""
    ppo: PpoConfig = PpoConfig()
    """The update."""
    hacking: HackingConfig = HackingConfig()
    """Warnings that the reward is being exploited."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """The held-out table."""

    @property
    def logprob_gap_limit(self) -> float:
        """`rollout.logprob_gap_limit`, or the one for the dtype."""
        return self.rollout.logprob_gap_limit or (0.005 if self.model.dtype == "float32" else 0.05)

    @model_validator(mode="after")
    def _dtype_can_be_trained(self) -> PpoRunConfig:
        refuse_float16_training(self.model)
        return self

    @model_validator(mode="after")
    def _adapter_fits_the_engine(self) -> PpoRunConfig:
        refuse_adapter_on_other_base(self.rollout, self.policy.adapter)
        why = "the rollout engines are sent merged weights, and virtual tokens and new layers are none"
        refuse_unmergeable(self.policy.adapter, "policy", why)
        refuse_adapter_for_model(self.model, self.critic.adapter, "critic")
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> PpoRunConfig:
        sequences = self.ppo.rollout_batch_size * self.ppo.num_samples_per_prompt
        if sequences % self.ppo.minibatch_size:
            raise ValueError(
                f"ppo.minibatch_size: got {self.ppo.minibatch_size}, expected a divisor of the {sequences} sequences "
                f"of a step ({self.ppo.rollout_batch_size} prompts x {self.ppo.num_samples_per_prompt} samples); "
                "choose one that divides it"
            )
        if self.ppo.one_pass and (self.ppo.ppo_epochs, self.ppo.minibatch_size) != (1, sequences):
            raise ValueError(
                f"ppo.one_pass: got ppo_epochs={self.ppo.ppo_epochs} and minibatch_size={self.ppo.minibatch_size}, "
                f"expected 1 and {sequences}: a second update needs log-probabilities from before the first; "
                "set them, or one_pass to false"
            )
        return self

    @model_validator(mode="after")
    def _micro_batches_hold_a_sequence(self) -> PpoRunConfig:
        prompt, response = self.data.max_prompt_tokens, self.rollout.max_new_tokens
        what = f"the longest sequence, data.max_prompt_tokens {prompt} + rollout.max_new_tokens {response}"
        refuse_small_budget(self.policy, "policy", prompt + response, what)
        refuse_small_budget(self.critic, "critic", prompt + response, what)
        return self

    @model_validator(mode="after")
    def _signs_can_come(self) -> PpoRunConfig:
        of_gold = [sign for sign in self.hacking.stop_on if sign in ("parted", "gold_unscored")]
        if of_gold and not self.reward.gold:
            raise ValueError(
                f"hacking.stop_on: got {of_gold[0]} without a gold function, expected one: nothing else can tell it; "
                "name one in reward.gold, or remove the sign"
            )
        if "clipped" in self.hacking.stop_on and self.reward.clip is None and not self.reward.clips:
            raise ValueError(
                "hacking.stop_on: got clipped without a clip, expected one: nothing is cut that could tell it; set "
                "reward.clip or the clip of a function, or remove the sign"
            )
        return self

    @model_validator(mode="after")
    def _policy_learns(self) -> PpoRunConfig:
        if self.critic.warmup_steps >= self.run.num_steps:
            raise ValueError(
                f"critic.warmup_steps: got {self.critic.warmup_steps}, expected less than the {self.run.num_steps} of "
                "run.num_steps, or the policy never learns; lower it, or raise run.num_steps"
            )
        return self

    @model_validator(mode="after")
    def _penalty_has_a_start(self) -> PpoRunConfig:
        self.reward.refuse_long_buffer(self.rollout.max_new_tokens)
        return self

    @model_validator(mode="after")
    def _controllers_fit_a_step(self) -> PpoRunConfig:
        sequences = self.ppo.rollout_batch_size * self.ppo.num_samples_per_prompt
        if self.kl.target is not None:
            check_horizon(self.kl.horizon, sequences)
        adaptive = self.policy.optimizer.adaptive_kl_target
        if adaptive is not None and sequences // self.ppo.minibatch_size * self.ppo.ppo_epochs == 1:
            raise ValueError(
                f"policy.optimizer.adaptive_kl_target: got {adaptive:g} with one optimiser step per batch, expected "
                "several: before the first the KL it follows is 0; lower ppo.minibatch_size, raise ppo.ppo_epochs, "
                "or set it to null"
            )
        return self

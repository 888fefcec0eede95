"""Typed configs of every stage: frozen, nested by owner, unknown keys refused. Importable without torch.

A config is a fact: building one has no side effect. Builders unpack it into plain arguments; no function of
the maths ever sees one. `alignment.config_io` reads YAML and dotted overrides into these classes.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Config(BaseModel):
    """Base of all configs. The string under a field is its documentation and its `--help` text."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


class SourceConfig(Config):
    """Where rows come from: exactly one of `path`, `hub`, `asset`."""

    path: str | None = None
    """Local file or glob: .jsonl .json .csv .parquet, each also .gz."""
    hub: str | None = None
    """Data set name for `datasets.load_dataset`."""
    hub_split: str = "train"
    """Split of the hub data set."""
    asset: str | None = None
    """Name of a packaged asset (see alignment/data/assets.py)."""
    limit: Positive | None = None
    """Read at most this many rows."""

    @model_validator(mode="after")
    def _one_source(self) -> SourceConfig:
        given = [name for name in ("path", "hub", "asset") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"got {given or 'no source'}, expected exactly one of path, hub, asset; set one of them")
        return self


class PromptDataConfig(Config):
    """Prompts for online training and for the held-out table."""

    source: SourceConfig = SourceConfig(asset="healthsearchqa")
    """Rows of prompts."""
    prompt_key: str = "question"
    """Column with the user's text, or with a `messages` list."""
    system_prompt: str | None = None
    """Put before every conversation; None leaves the template's own default."""
    max_prompt_tokens: Positive = 128
    """A longer prompt is refused (or skipped, see on_long_prompt)."""
    on_long_prompt: Literal["error", "skip"] = "error"
    """`skip` drops prompts over the limit and counts them aloud."""
    held_out: NonNegative = 48
    """Prompts kept out of training and answered before and after; chosen by a hash of the prompt id."""


class ModelConfig(Config):
    """A causal language model."""

    path: str = "asset:smollm2-135m-instruct"
    """Hugging Face folder, hub name, or `asset:NAME`."""
    revision: str | None = None
    """Commit hash of a hub model."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Weights and matrix products; losses are float32 whatever this is."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """`auto` takes flash-attn when it is installed and the device and dtype fit, else SDPA."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


class AdapterConfig(Config):
    """LoRA. `r: 0` trains every parameter."""

    r: NonNegative = 0
    """Rank; 0 means full fine-tuning."""
    alpha: PositiveFloat = 32.0
    """Scale: the update is multiplied by alpha / r."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Module names that get an adapter."""
    last_layers: Positive | None = None
    """Adapt only this many layers, counted from the top: the backward pass stops below them."""


class OptimizerConfig(Config):
    """AdamW, warm-up and decay; counts optimiser steps."""

    lr: PositiveFloat = 1e-5
    """Peak learning rate."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's."""
    eps: PositiveFloat = 1e-8
    """AdamW's."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled, on matrices only."""
    warmup_ratio: Fraction = 0.05
    """Share of all optimiser steps with a rising rate; the first rate is above 0."""
    decay: Literal["constant", "linear", "cosine"] = "linear"
    """Shape after warm-up."""
    min_lr_ratio: Fraction = 0.1
    """Floor of the decay as a share of `lr`."""
    max_grad_norm: PositiveFloat = 1.0
    """Global gradient clipping; a non-finite norm skips the step and is counted."""
    adaptive_kl_target: PositiveFloat | None = None
    """KL per token between old and new policy that the rate steers towards (policy only); None switches it off.
    It reads the KL before each optimiser step, so it needs several steps per batch."""
    adaptive_bounds: tuple[PositiveFloat, PositiveFloat] = (0.1, 4.0)
    """Limits of the KL-adaptive factor on the rate."""


class PolicyConfig(Config):
    """The model that learns."""

    adapter: AdapterConfig = AdapterConfig()
    """LoRA or full."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Its optimiser."""
    micro_batch_size: Positive = 4
    """Sequences per forward on one worker."""


class CriticConfig(Config):
    """The value model: the same backbone with a scalar head that starts at zero."""

    path: str | None = None
    """Backbone; None takes the policy's."""
    adapter: AdapterConfig = AdapterConfig()
    """LoRA or full; the head is always trained."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=2e-5)
    """Its optimiser."""
    micro_batch_size: Positive = 4
    """Sequences per forward on one worker."""
    warmup_steps: NonNegative = 0
    """First steps in which the critic learns and the policy does not."""


class RolloutConfig(Config):
    """Sampling. While training, top-p and top-k are refused: see docs/sampling.md."""

    engine: Literal["transformers"] = "transformers"
    """The embedded engine; the cluster YAML may name another."""
    max_new_tokens: Positive = 64
    """Generation limit per response."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; every log-probability is taken at it."""
    top_p: float = 1.0
    """Must be 1 while training: a cut support would put log S into every ratio."""
    top_k: int = 0
    """Must be 0 while training, for the same reason."""
    stop: tuple[str, ...] = ()
    """Custom stop tokens beside EOS; each must be a single token of the vocabulary."""
    ignore_eos: bool = False
    """Answer to the limit whatever is sampled: for measuring speed."""
    max_batch: Positive = 64
    """Sequences decoded together by one engine."""
    logprob_gap_limit: PositiveFloat = 0.05
    """Largest mean |rollout - trainer| log-probability accepted before the first update."""

    @model_validator(mode="after")
    def _whole_support(self) -> RolloutConfig:
        if self.top_p != 1.0 or self.top_k != 0:
            raise ValueError(
                f"got top_p={self.top_p}, top_k={self.top_k}, expected 1.0 and 0: a cut support makes the trainer's "
                "log-probabilities differ from the sampler's; remove them, lower the temperature instead"
            )
        return self


class RewardFunctionConfig(Config):
    """One rule reward."""

    name: str
    """`module:function` below the rewards package, e.g. `text:finished_sentence`."""
    weight: float = 1.0
    """Factor in the total."""


class RewardConfig(Config):
    """What scores an answer: a reward model, rule functions, or both, added with weights."""

    model: str | None = None
    """Folder or hub name of a sequence-classification model with one label; None uses functions alone."""
    model_weight: float = 1.0
    """Factor of the reward model's score."""
    standardize_model: bool = True
    """Subtract the mean and divide by the standard deviation saved with the reward model, where it has them."""
    functions: tuple[RewardFunctionConfig, ...] = ()
    """Rule rewards."""
    micro_batch_size: Positive = 8
    """Sequences per forward."""
    clip: PositiveFloat | None = None
    """Scores are cut to [-clip, clip]."""
    normalize: bool = False
    """Divide by the running standard deviation of scores, the mean subtracted."""
    missing_eos_penalty: NonNegativeFloat = 0.0
    """Subtracted from answers that the limit cut off."""
    overlong_buffer: NonNegative = 0
    """Last tokens before the limit over which a penalty grows from 0 to overlong_penalty; 0 switches it off."""
    overlong_penalty: NonNegativeFloat = 1.0
    """Full overlong penalty."""
    max_unscorable: Fraction = 0.0
    """Share of a batch that may come back unscored before the run stops."""

    @model_validator(mode="after")
    def _something_scores(self) -> RewardConfig:
        if self.model is None and not self.functions:
            raise ValueError("got no reward.model and no reward.functions, expected at least one; name one")
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
    """Sequences over which the controller acts."""
    limit: PositiveFloat | None = None
    """KL per sequence over which the run stops, naming it; None never stops."""


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


class EvaluationConfig(Config):
    """The held-out table."""

    greedy: bool = False
    """Most likely tokens instead of samples; before and after draw the same random numbers either way."""
    num_shown: NonNegative = 4
    """Held-out prompts printed with both answers at the end, only with run.show_text."""


class RunConfig(Config):
    """One run."""

    seed: NonNegative = 1
    """Decides data order, sampling, and initialisation."""
    num_steps: Positive = 10
    """Steps of the loop."""
    checkpoint_every: Positive = 1
    """Steps between checkpoints."""
    keep_checkpoints: Positive = 2
    """Newest complete checkpoints kept."""
    show_text: bool = False
    """Allow prompts and answers on the console; they are in rollouts.jsonl (mode 0600) in any case."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Writers beside metrics.jsonl."""


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
    evaluation: EvaluationConfig = EvaluationConfig()
    """The held-out table."""

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


class PreferenceDataConfig(Config):
    """Pairs for a reward model."""

    source: SourceConfig = SourceConfig(asset="treatment-plans")
    """Rows with `prompt`, `chosen`, `rejected`."""
    system_prompt: str | None = None
    """As in the run that will use the reward model."""
    max_tokens: Positive = 256
    """Longer sequences are cut from the end of the answer."""
    held_out: NonNegative = 32
    """Pairs kept for the accuracy report; split by prompt."""


class RewardModelTrainingConfig(Config):
    """The Bradley-Terry stage."""

    adapter: AdapterConfig = AdapterConfig()
    """LoRA (merged at the end) or full; the head is always trained."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=5e-5)
    """Its optimiser."""
    batch_size: Positive = 8
    """Pairs per optimiser step."""
    micro_batch_size: Positive = 4
    """Pairs per forward."""
    center_coef: NonNegativeFloat = 0.01
    """Weight of the squared sum of the two scores (Eisenstein 2023)."""


class RewardModelRunConfig(Config):
    """Everything of a reward-model run but the machines."""

    run: RunConfig = RunConfig()
    """The run itself; num_steps counts optimiser steps."""
    data: PreferenceDataConfig = PreferenceDataConfig()
    """Pairs."""
    model: ModelConfig = ModelConfig()
    """Backbone."""
    training: RewardModelTrainingConfig = RewardModelTrainingConfig()
    """The stage."""


class RoleConfig(Config):
    """The machines of one role."""

    num_workers: Positive = 1
    """Processes."""
    cpus_per_worker: PositiveFloat = 0.2
    """CPUs that each reserves; a fraction lets roles share a core in time."""
    gpus_per_worker: NonNegativeFloat = 0.0
    """GPUs that each reserves."""
    threads_per_worker: Positive | None = None
    """Threads of each worker's matrix products; None takes the machine's cores. Part of bitwise reproducibility."""
    engine: Literal["torch"] = "torch"
    """How an optimiser step runs."""


class RolloutRoleConfig(Config):
    """The machines of the rollout engines."""

    engine: Literal["transformers"] = "transformers"
    """Generation engine."""
    num_engines: Positive = 1
    """Engines, each with a copy of the weights."""
    tensor_parallel_size: Positive = 1
    """GPUs of one engine."""
    cpus_per_worker: PositiveFloat = 0.2
    """CPUs that each engine reserves."""
    gpus_per_worker: NonNegativeFloat = 0.0
    """GPUs that each engine reserves."""
    threads_per_worker: Positive | None = None
    """Threads of each engine."""

    @property
    def num_workers(self) -> int:
        return self.num_engines


ROLES = ("policy", "critic", "reference", "reward_model", "rollout")


class ClusterConfig(Config):
    """The machines: the only file to edit to scale a run."""

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
    placement_timeout: PositiveFloat = 15.0
    """Seconds to wait for the machines before giving up."""

    @model_validator(mode="after")
    def _colocate_names_roles(self) -> ClusterConfig:
        named = [role for group in self.colocate for role in group]
        unknown = sorted(set(named) - set(ROLES))
        if unknown or len(named) != len(set(named)):
            raise ValueError(
                f"colocate: got {self.colocate}, expected each of {ROLES} at most once; correct the groups"
            )
        for group in self.colocate:
            if len({getattr(self, role).num_workers for role in group}) > 1:
                raise ValueError(
                    f"colocate: got different numbers of workers in {group}, expected one number; align them"
                )
        return self

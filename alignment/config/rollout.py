"""Sampling."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from alignment.config.base import Config, Positive, PositiveFloat
from alignment.config.model import AdapterConfig


class VllmConfig(Config):
    """How vLLM runs. What is left at None, vLLM decides."""

    max_model_len: Positive | None = None
    """Longest prompt and response together; None is what the run needs, and with an endpoint 2048 where the model has
    room for them."""
    kv_cache_gb: PositiveFloat | None = None
    """Cache of keys and values of one engine; None is 1 GB on a CPU, and what `memory_share` leaves on a GPU."""
    memory_share: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of the GPU that weights, activations and cache may fill."""
    eager: bool | None = None
    """Run without compiled graphs; None is yes on a CPU and no on a GPU."""
    batch_invariant: bool = False
    """On GPUs, use vLLM's kernels whose rounding does not depend on what else is in the batch: slower, and samples no
    longer depend on the number of engines at all. A CPU has none."""


class CorrectionConfig(Config):
    """Weights for tokens that the engine samples with other probabilities than the trainer computes."""

    kind: Literal["none", "token_tis", "sequence_tis", "icepop"] = "none"
    """What a token's loss is multiplied by, from the ratio of the trainer's probability to the sampler's: `none` 1,
    `token_tis` its ratio up to `cap`, `sequence_tis` the product of its response's ratios up to `cap`, `icepop` its
    ratio from `low` to `high` and 0 outside. Tokens of weight 0 still count in the mean."""
    cap: Annotated[float, Field(ge=1)] = 2.0
    """Largest weight of token_tis and sequence_tis (truncated importance sampling, Yao et al. 2025)."""
    low: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Ratio below which icepop drops a token (arXiv 2510.18855)."""
    high: Annotated[float, Field(ge=1)] = 5.0
    """Ratio above which icepop drops a token."""


class RolloutConfig(Config):
    """Sampling. While training, top-p and top-k are refused: see docs/sampling.md."""

    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """What samples; `auto` takes the one that the cluster YAML names, else vLLM where it is installed."""
    vllm: VllmConfig = VllmConfig()
    """Only read where vLLM samples."""
    lora_sync: Literal["auto", "adapter", "merged"] = "auto"
    """What vLLM receives of a policy with an adapter: the adapter alone, or the whole model with it merged in. `auto`
    takes the adapter of lora and rslora on a GPU. It takes merged weights of the other types, which vLLM does not
    have; on a CPU, where vLLM's kernels for adapters halve its speed; and of a four-bit policy, whose base vLLM does
    not have. transformers always takes merged weights."""
    max_new_tokens: Positive = 64
    """Generation limit per response."""
    temperature: Annotated[float, Field(ge=0.01)] = 1.0
    """Sampling temperature; every log-probability is taken at it. Below 0.01 vLLM would sample at 0.01."""
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
    endpoint_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port of an OpenAI-compatible endpoint on 127.0.0.1, where the first engine runs, to talk to the policy while it
    trains; None is no endpoint. Needs the extra `serve`; see docs/rollout_engines.md."""
    logprob_gap_limit: PositiveFloat | None = None
    """Largest mean |rollout - trainer| log-probability over a step's tokens; above it the run stops before the step's
    update. None is 0.005 in float32, several hundred times what rounding explains, and 0.05 in bfloat16."""
    correction: CorrectionConfig = CorrectionConfig()
    """What to do about a gap below the limit."""
    probe_gap_limit: PositiveFloat | None = None
    """Largest mean |engine - trainer| log-probability of the probe prompt accepted after a weight sync; None is 0.001
    in float32, 0.05 in bfloat16 and 0.02 in float16."""

    @model_validator(mode="after")
    def _whole_support(self) -> RolloutConfig:
        if self.top_p != 1.0 or self.top_k != 0:
            raise ValueError(
                f"got top_p={self.top_p}, top_k={self.top_k}, expected 1.0 and 0: a cut support makes the trainer's "
                "log-probabilities differ from the sampler's; remove them, lower the temperature instead"
            )
        return self


def refuse_adapter_on_other_base(rollout: RolloutConfig, adapter: AdapterConfig, section: str = "policy") -> None:
    """An adapter that is sent alone must be one that vLLM has; a four-bit policy's fits the rounded base, which no
    engine has. `section`: where the config keeps the adapter."""
    if rollout.lora_sync == "adapter" and adapter.type == "lora" and not adapter.r:
        raise ValueError(
            f"rollout.lora_sync: got adapter with {section}.adapter.r=0, expected a policy with an adapter; set "
            f"{section}.adapter.r, or lora_sync to auto"
        )
    if rollout.lora_sync == "adapter" and not adapter.served_alone:
        raise ValueError(
            f"rollout.lora_sync: got adapter with {section}.adapter.type={adapter.type}, expected merged: vLLM "
            "samples with LoRA and rsLoRA adapters only; set it to auto or merged"
        )
    if rollout.lora_sync == "adapter" and adapter.quantization != "none":
        raise ValueError(
            f"rollout.lora_sync: got adapter with {section}.adapter.quantization={adapter.quantization}, "
            "expected merged: vLLM has the base as it was before rounding; set it to auto or merged"
        )

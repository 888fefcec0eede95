"""The embedded engine: a transformers model of its own, or the policy's when both live in one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from actors.engines.base import SamplingSettings
from actors.rendezvous import Rendezvous
from actors.weight_routes import BroadcastGroup
from actors.weight_sync import AdapterUpdate, SyncKind, SyncState, WeightBucket, unpack_bucket
from alignment.generation import Sample, generate
from alignment.logprobs import token_logprobs
from alignment.models import HfModel


class TransformersEngine:
    """Batched sampling with `alignment.generation`."""

    sync_kind: SyncKind = "changed"

    def __init__(self, model: HfModel, *, max_batch: int) -> None:
        self.model, self.max_batch = model, max_batch
        self.max_model_len: int | None = getattr(model.model.config, "max_position_embeddings", None)
        self._sync = SyncState()
        self._group: BroadcastGroup | None = None

    @property
    def weight_version(self) -> int:
        return self._sync.version

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], settings: Sequence[SamplingSettings]
    ) -> list[Sample]:
        _ = self.weight_version  # refuses torn weights
        samples: dict[int, Sample] = {}
        # Only the limit may differ within a batch.
        kinds = [replace(setting, max_new_tokens=1) for setting in settings]
        for kind in dict.fromkeys(kinds):
            rows = [i for i, other in enumerate(kinds) if other == kind]
            made = generate(
                self.model,
                [prompts[i] for i in rows],
                [seeds[i] for i in rows],
                max_new_tokens=[settings[i].max_new_tokens for i in rows],
                temperature=kind.temperature,
                stop_ids=kind.stop_ids,
                greedy=kind.greedy,
                max_batch=self.max_batch,
            )
            samples.update(zip(rows, made, strict=True))
        return [samples[i] for i in range(len(prompts))]

    def join(self, rendezvous: Rendezvous, *, first_rank: int) -> None:
        self._group = BroadcastGroup(rendezvous, rank=first_rank)

    def begin_sync(self, *, version: int, buckets: int) -> None:
        self._sync.begin(version, buckets)

    @torch.no_grad()
    def receive(self, bucket: WeightBucket) -> None:
        parameters = dict(self.model.model.named_parameters())
        for name, tensor in unpack_bucket(bucket, self._group):
            parameters[name].copy_(tensor)
        self._sync.received(bucket)

    def finish_sync(self, *, version: int) -> int:
        self._sync.complete(version)
        self._sync.end(version)
        return version

    def follow(self, *, version: int) -> int:
        """The weights are the policy's own memory: only the version moves."""
        self._sync.end(version)
        return version

    def receive_adapter(self, update: AdapterUpdate) -> int:
        raise RuntimeError("got an adapter for the transformers engine, expected merged weights")

    def probe_logprobs(self, ids: Sequence[int]) -> list[float]:
        return probe_logprobs(self.model, ids)

    def sleep(self, *, discard_weights: bool = False) -> int:
        """Nothing is held between calls but the weights."""
        return 0

    def wake(self) -> None:
        return

    def close(self) -> None:
        return


@torch.no_grad()
def probe_logprobs(model: HfModel, ids: Sequence[int]) -> list[float]:
    """log p(ids[t] | ids[:t]) for t >= 1, at temperature 1: the trainer's side of a probe."""
    input_ids = torch.tensor([list(ids)], device=model.device)
    logits = model.run(lambda own: own.head(own.hidden(input_ids, torch.ones_like(input_ids, dtype=torch.bool))))
    result: list[float] = token_logprobs(logits, input_ids)[0, 1:].tolist()
    return result

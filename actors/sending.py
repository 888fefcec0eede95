"""A language model that learns, and that rollout engines sample from: what both sides of a sync ask of it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from actors.engines.transformers import probe_logprobs
from actors.rendezvous import Rendezvous, node_address
from actors.weight_routes import Route, Whereabouts
from actors.weight_sender import WeightSender
from actors.weight_sync import AdapterUpdate, Probe, WeightBucket, pack_adapter, probe_ids
from actors.worker import Actor
from alignment import adapters
from alignment.models import HfModel


class SendingActor(Actor):
    """Its weights go to engines, merged bucket by bucket, or its adapter alone."""

    model: HfModel
    """Loaded by `setup`."""
    model_path: str
    device: str
    sender: WeightSender
    """Made by `setup` of the model that it loaded: one that is set up anew sends its new weights."""

    def whereabouts(self) -> Whereabouts:
        return self.sender.whereabouts()

    def open_group(self, *, receivers: int) -> Rendezvous:
        """Where the engines' workers find the broadcast group that `meet` forms."""
        return self.sender.open_group(node_address(), receivers=receivers)

    def meet(self) -> None:
        self.sender.meet()

    def plan_sync(self, *, whole: bool) -> int:
        """Buckets that make a rollout engine this policy: of merged weights, all of them with `whole`."""
        return self.sender.plan(whole=whole)

    def export_bucket(
        self, *, version: int, index: int, whole: bool, route: Route = "object_store"
    ) -> WeightBucket | None:
        """Bucket `index` of the plan, packed and hashed."""
        return self.sender.pack(version=version, index=index, whole=whole, route=route)

    def broadcast_bucket(self, *, index: int) -> None:
        """The bytes of a bucket that was exported for the broadcast."""
        self.sender.broadcast(index=index)

    def export_adapter(self, *, version: int) -> AdapterUpdate | None:
        """The adapter alone, for engines that have the base model."""
        write = self.ranks.rank == 0
        with tempfile.TemporaryDirectory(prefix="raylign-adapter-") as folder:
            adapters.save_adapter(self.model.model, Path(folder), base=self.model_path, write=write)
            return pack_adapter(Path(folder), version=version) if write else None

    def probe(self, *, version: int) -> Probe:
        """What an engine with these weights must compute; the last call of a sync."""
        self.sender.forget()
        ids = probe_ids(self.model.model.config.vocab_size)
        return Probe(version=version, ids=ids, logprobs=tuple(self.probe_logprobs(ids)))

    def probe_logprobs(self, ids: Sequence[int]) -> list[float]:
        """log p(ids[t] | ids[:t]) for t >= 1, at temperature 1."""
        return probe_logprobs(self.model, ids)

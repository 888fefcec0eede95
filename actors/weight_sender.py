"""The policy's side of a weight sync: what goes into which bucket, and how long its memory lives."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from actors.rendezvous import Rendezvous, open_rendezvous
from actors.weight_routes import BroadcastGroup, Route, Whereabouts, whereabouts
from actors.weight_sync import BUCKETS_UNDER_WAY, WeightBucket, pack_block, plan_buckets
from alignment import adapters


class WeightSender:
    """Packs the merged weights of a model, bucket by bucket."""

    def __init__(self, model: torch.nn.Module, device: str, *, leads: bool = True) -> None:
        """`leads`: False for a rank that only takes part in gathering what is split."""
        self.model, self.device, self.leads = model, device, leads
        self._plan: list[set[str]] = []
        self._blocks: dict[int, Tensor] = {}
        """Blocks that a receiver may still read: as many as are under way."""
        self._met: tuple[Rendezvous, dist.Store] | None = None
        self._group: BroadcastGroup | None = None

    def whereabouts(self) -> Whereabouts:
        return whereabouts(self.device)

    def plan(self, *, whole: bool) -> int:
        """Buckets that make an engine this model: of merged weights, all of them with `whole`."""
        sizes = adapters.merged_sizes(self.model, whole=whole)
        names = list(sizes)
        self._plan = [set(names[part.start : part.stop]) for part in plan_buckets(list(sizes.values()))]
        return len(self._plan)

    def pack(self, *, version: int, index: int, whole: bool, route: Route) -> WeightBucket | None:
        """Bucket `index` of the plan, packed and hashed; through host memory where the object store carries it.

        Of a model that is split over ranks, no more than a bucket is gathered at a time.
        """
        weights = adapters.merged_weights(self.model, self._plan[index], whole=whole)
        if not self.leads:
            if adapters.is_split_model(self.model):
                for _ in weights:  # every rank gathers, the first one keeps
                    pass
            return None
        device = "cpu" if route == "object_store" else self.device
        bucket, block = pack_block(weights, version=version, index=index, device=device, route=route)
        if self.device != "cpu":
            torch.cuda.synchronize()  # another process reads the block without this one's stream
        self._blocks[index] = block
        self._blocks.pop(index - BUCKETS_UNDER_WAY, None)
        return bucket

    def open_group(self, address: str, *, receivers: int) -> Rendezvous:
        """Listen for the members of a broadcast group; `meet` waits for them."""
        backend: Any = "gloo" if self.device == "cpu" else "nccl"
        self._met = open_rendezvous(address, world_size=receivers + 1, backend=backend)
        return self._met[0]

    def meet(self) -> None:
        """Form the group that `open_group` announced."""
        assert self._met is not None, "open_group comes first"
        self._group = BroadcastGroup(self._met[0], rank=0, store=self._met[1])

    def broadcast(self, *, index: int) -> None:
        """Send the bytes of a bucket that was packed for this route."""
        if not self.leads:
            return
        assert self._group is not None, "meet comes first"
        self._group.send(self._blocks[index])

    def forget(self) -> None:
        """Every receiver has what it needs."""
        self._blocks.clear()

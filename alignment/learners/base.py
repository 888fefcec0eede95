"""What every learner shares: metrics that add up, and forward passes over ragged rollouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alignment.adapters import TrainingMethod
from alignment.batching import micro_batches, rollout_batch, rollout_lengths
from alignment.distributed import Alone, Ranks, own_rows
from alignment.engines.base import Engine
from alignment.forward import idle_output
from alignment.models import CausalModel
from alignment.packing import MicroBatchLimit
from alignment.types import Rollout


class Tally:
    """Metrics of one update. Micro-batches add up (each is divided by the minibatch's count), minibatches average."""

    def __init__(self, ranks: Ranks | None = None) -> None:
        self._ranks = ranks or Alone()
        self._minibatches: list[dict[str, float]] = []

    def begin_minibatch(self) -> None:
        self._minibatches.append({})

    def add(self, metrics: Mapping[str, float | Tensor]) -> None:
        """Counts, sums and means add; a key that ends in `_max` keeps the largest."""
        _add_up(self._minibatches[-1], metrics)

    def end_minibatch(self) -> None:
        """Add up what the ranks have of this minibatch; what is added from here on all of them know."""
        merged: dict[str, float] = {}
        for metrics in self._ranks.gather(self._minibatches[-1]):
            _add_up(merged, metrics)
        self._minibatches[-1] = merged

    def current(self, name: str) -> float:
        return self._minibatches[-1][name]

    def result(self, prefix: str) -> dict[str, float]:
        """`prefix/name`: means over minibatches; maxima and counts over all of them."""
        merged: dict[str, float] = {}
        for name in dict.fromkeys(name for metrics in self._minibatches for name in metrics):
            values = [metrics[name] for metrics in self._minibatches if name in metrics]
            if name.endswith("_max"):
                merged[f"{prefix}/{name}"] = max(values)
            elif name.endswith("_count"):
                merged[f"{prefix}/{name}"] = sum(values)
            else:
                merged[f"{prefix}/{name}"] = sum(values) / len(values)
        return merged


def _add_up(current: dict[str, float], metrics: Mapping[str, float | Tensor]) -> None:
    for name, value in metrics.items():
        number = float(value)
        if name.endswith("_max"):
            current[name] = max(current.get(name, number), number)
        else:
            current[name] = current.get(name, 0.0) + number


class Learner:
    """A model and the optimiser that steps on it: what learners with one loss and one step per batch share."""

    def __init__(
        self,
        model: CausalModel,
        engine: Engine,
        *,
        micro_batch_limit: MicroBatchLimit,
        method: TrainingMethod | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """
        Args:
            micro_batch_limit: its rows are those that the kind of learner is given.
            method: what is told of every update.
        """
        self.model, self.engine, self.method, self.device = model, engine, method, device
        self.micro_batch_limit = micro_batch_limit

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the weights."""
        return {"engine": self.engine.state_dict(), **method_state(self.method)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.engine.load_state_dict(state["engine"])
        load_method(self.method, state)

    def _begin(self) -> Tally:
        """Before the first forward of an update."""
        tally = Tally(self.engine.ranks)
        tally.begin_minibatch()
        begin_update(self.engine, self.method)
        return tally

    def _micro_batches(self, lengths: Tensor, *, backward: bool = True) -> list[Tensor]:
        """This rank's rows of a batch, cut; `lengths` as for `own_micro_batches`."""
        rows, limit = torch.arange(len(lengths)), self.micro_batch_limit
        return own_micro_batches(self.model, self.engine, rows, lengths, limit, backward=backward, device=self.device)

    def _finish(self, tally: Tally, prefix: str) -> dict[str, float]:
        """The optimiser's step, and what there is to tell of the update."""
        tally.add(finish_update(self.engine, self.method))
        return {**tally.result(prefix), **method_metrics(self.method)}


def own_micro_batches(
    model: CausalModel,
    engine: Engine,
    index: Tensor,
    lengths: Tensor,
    limit: MicroBatchLimit,
    *,
    backward: bool = True,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """This rank's micro-batches of the rows of a minibatch; `lengths` is (B,), or (B, k) for rows of k sequences.

    Where ranks make passes together, it has taken part, with nothing, in those that others have more.
    """
    tokens = lengths if lengths.ndim == 1 else lengths.sum(1)
    own = micro_batches(own_rows(index, tokens, engine.ranks), lengths, limit)
    for _ in range(missing_passes(len(own), engine.lockstep)):
        output = idle_output(model, device)
        if backward:
            engine.backward(0 * output)
    return own


def begin_update(engine: Engine, method: TrainingMethod | None) -> None:
    """Before the first forward of an update: let the training method choose what is trained."""
    if method is not None:
        method.begin_update(engine.num_updates)


def finish_update(engine: Engine, method: TrainingMethod | None) -> dict[str, float]:
    """The engine's step, with what the training method adds to the loss and reads of the gradients."""
    if method is None:
        return engine.step()
    update, penalty = engine.num_updates, method.penalty()
    if penalty is not None:
        engine.backward(penalty / engine.ranks.size)  # gradients are summed over ranks
    return engine.step(before_forgetting=lambda: method.end_update(update))


def method_metrics(method: TrainingMethod | None) -> dict[str, float]:
    return {} if method is None else method.metrics()


def method_state(method: TrainingMethod | None) -> dict[str, Any]:
    """What a learner's state has of the training method: nothing where there is none."""
    return {} if method is None else {"method": method.state_dict()}


def load_method(method: TrainingMethod | None, state: Mapping[str, Any]) -> None:
    """Put back what `method_state` gave."""
    if method is not None:
        method.load_state_dict(state["method"])


def missing_passes(num_passes: int, lockstep: Ranks | None) -> int:
    """Passes that some rank makes and this one does not."""
    return 0 if lockstep is None else max(lockstep.gather(num_passes)) - num_passes


@torch.no_grad()
def per_response(
    rollouts: Sequence[Rollout],
    forward: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    limit: MicroBatchLimit,
    device: torch.device | str = "cpu",
    lockstep: Ranks | None = None,
) -> list[Tensor]:
    """Run `forward(input_ids, attention_mask, response_mask) -> (b, T)` in micro-batches of similar length.

    `lockstep`: the ranks that a model is split over, which make forwards together; each has rollouts of its own.

    Returns per rollout the (R_i,) float32 numbers of its response tokens, on the CPU, in the order given.
    """
    results: list[Tensor | None] = [None] * len(rollouts)
    lengths = rollout_lengths(rollouts)
    batches = micro_batches(torch.arange(len(rollouts)), lengths, limit)
    nothing = torch.zeros(1, 2, dtype=torch.int64, device=device)
    for _ in range(missing_passes(len(batches), lockstep)):
        forward(nothing, nothing == 0, nothing == 1)
    for index in batches:
        chosen = [rollouts[i] for i in index.tolist()]
        input_ids, attention_mask, response_mask = rollout_batch(chosen, device)
        numbers = forward(input_ids, attention_mask, response_mask)
        for row, i in enumerate(index.tolist()):
            results[i] = numbers[row][response_mask[row]].float().cpu()
    return [numbers for numbers in results if numbers is not None]

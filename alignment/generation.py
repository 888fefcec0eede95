"""Sample from a transformers model: batched, one random stream per sample, finished rows leave the batch.

A sample depends on its own seed and prompt, not on who else is decoded: its noise is drawn from its own generator, and
a token is the argmax of log-probability + Gumbel noise (Gumbel, "Statistical Theory of Extreme Values", 1954; Maddison
et al., "A* Sampling", 2014). Batches of other sizes and other numbers of threads move the last bits of logits; that
changes a token only where two words all but tie. The inverse distribution function has a border for every word and
rounding moves them all: it changes one token in a few hundred.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from alignment.adapters.virtual_tokens import active_virtual_tokens
from alignment.models import HfModel
from alignment.types import FinishReason


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Token ids out, as sampled."""

    response_ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...]
    finish_reason: FinishReason


HELD_OUT_STEP = -1
"""Stands for the step in the seeds of held-out answers, so that before and after draw the same random numbers."""


def sampling_seed(run_seed: int, prompt_id: str, step: int, sample_index: int) -> int:
    """63-bit seed of one response: a lost worker's samples come back the same elsewhere."""
    digest = hashlib.sha256(f"{run_seed}/{prompt_id}/{step}/{sample_index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@torch.inference_mode()
def generate(
    model: HfModel,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    *,
    max_new_tokens: int | Sequence[int],
    temperature: float,
    stop_ids: frozenset[int],
    greedy: bool = False,
    max_batch: int = 64,
) -> list[Sample]:
    """One sample per prompt, in the order given; `max_batch` sequences are decoded together.

    `max_new_tokens` is one limit for all, or one per prompt. `stop_ids` end a response and belong to it.
    Log-probabilities are float32 at `temperature` over the whole vocabulary, greedy or not.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    # Neighbours in length share a batch: left padding is work.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    samples: dict[int, Sample] = {}
    with _evaluating(model.model), packed_matrices(model, rows=min(len(prompts), max_batch)):
        for start in range(0, len(order), max_batch):
            rows = order[start : start + max_batch]
            batch = _Batch(
                model, [prompts[i] for i in rows], [seeds[i] for i in rows], [limits[i] for i in rows], stop_ids
            )
            for i, sample in zip(rows, batch.run(temperature, greedy), strict=True):
                samples[i] = sample
    return [samples[i] for i in range(len(prompts))]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """A model that trains with gradient checkpointing is in train mode, in which transformers keeps no cache."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextlib.contextmanager
def packed_matrices(model: HfModel, *, rows: int) -> Iterator[None]:
    """Store the linear layers in oneDNN's blocked order while decoding on a CPU in float32.

    Decoding multiplies few rows by every matrix of the model. In plain order each product packs its matrix anew, which
    reads and writes it once more than the product itself: about twice the time at 16 rows. The packed copy lives for
    one call of `generate`, when no activations are held.
    """
    layers = [module for module in model.model.modules() if type(module) is nn.Linear and module.bias is None]
    usable = (
        model.device.type == "cpu"
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and all(layer.weight.dtype == torch.float32 for layer in layers)
    )
    if usable:
        for layer in layers:
            packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
            layer.forward = partial(_packed_linear, packed)
    try:
        yield
    finally:
        for layer in layers if usable else ():
            del layer.forward


def _packed_linear(packed: Tensor, x: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return result


class _RoomyLayer(DynamicLayer):
    """A cache layer with room for the whole answer: a step writes one column instead of copying all of them."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [self._room(states) for states in (key_states, value_states)]
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[..., start:end, :] = states
        return self._show(end)

    def batch_select_indices(self, indices: Tensor) -> None:
        end = self.get_seq_length()
        self.buffers = [buffer[indices] for buffer in self.buffers]
        self._show(end)

    def _room(self, states: Tensor) -> Tensor:
        batch, heads, _, width = states.shape
        return states.new_empty(batch, heads, self.capacity, width)

    def _show(self, end: int) -> tuple[Tensor, Tensor]:
        keys, values = (buffer[..., :end, :] for buffer in self.buffers)
        self.keys, self.values = keys, values
        return keys, values


def _roomy_cache(config: Any, capacity: int) -> DynamicCache:
    """The model's own kinds of layers, except that plain full attention gets a `_RoomyLayer`."""
    cache = DynamicCache(config=config)
    cache.layers = [_RoomyLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class _Batch:
    """The rows that are decoded together: the cache holds only the unfinished ones."""

    def __init__(
        self,
        model: HfModel,
        prompts: list[Sequence[int]],
        seeds: list[int],
        limits: list[int],
        stop_ids: frozenset[int],
    ) -> None:
        self.model, self.limits, self.stop_ids = model, limits, stop_ids
        device = model.device
        longest = max(map(len, prompts))
        self.input_ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        self.mask = torch.arange(longest, device=device) >= (longest - lengths).unsqueeze(1)
        self.next_position = lengths.unsqueeze(1)
        self.generators = [torch.Generator(device).manual_seed(s) for s in seeds]
        self.rows = torch.arange(len(prompts), device=device)
        self.ids: list[list[int]] = [[] for _ in prompts]
        self.logprobs: list[list[float]] = [[] for _ in prompts]
        self.stopped = [False] * len(prompts)

    def _begin(self) -> tuple[Any, Tensor]:
        """A cache with the virtual tokens, if the model has some, and the positions of the prompts behind them."""
        positions = (self.mask.long().cumsum(-1) - 1).clamp(min=0)
        virtual = active_virtual_tokens(self.model.model)
        front = 0 if virtual is None else virtual.num_tokens
        cache = _roomy_cache(self.model.model.config, front + self.input_ids.shape[1] + max(self.limits))
        if virtual is not None:
            virtual.fill(self.model.model.base_model, cache, len(self.input_ids))
            self.mask = torch.nn.functional.pad(self.mask, (front, 0), value=True)
            self.next_position = self.next_position + front
        return cache, positions + front

    def run(self, temperature: float, greedy: bool) -> list[Sample]:
        cache, prefill_positions = self._begin()
        output = self._forward(self.input_ids, prefill_positions, cache)
        active = torch.ones(len(self.ids), dtype=torch.bool, device=self.rows.device)
        for _ in range(max(self.limits)):
            streams = None if greedy else [self.generators[row] for row in self.rows.tolist()]
            tokens, logprobs = _pick(output.logits[:, -1], streams, temperature)
            self._record(tokens, logprobs, active)
            if not active.any():
                break
            tokens, active = self._drop_finished(tokens, active, cache)
            self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=True)
            output = self._forward(tokens.unsqueeze(1), self.next_position, cache)
            self.next_position = self.next_position + 1
        return [
            Sample(
                response_ids=tuple(ids),
                rollout_logprobs=tuple(logprobs),
                finish_reason="stop" if stopped else "length",
            )
            for ids, logprobs, stopped in zip(self.ids, self.logprobs, self.stopped, strict=True)
        ]

    def _forward(self, ids: Tensor, position_ids: Tensor, cache: Any) -> Any:
        return self.model.model(
            input_ids=ids,
            attention_mask=self.mask.long(),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )

    def _record(self, tokens: Tensor, logprobs: Tensor, active: Tensor) -> None:
        for i, row in enumerate(self.rows.tolist()):
            if not active[i]:
                continue
            token = int(tokens[i])
            self.ids[row].append(token)
            self.logprobs[row].append(float(logprobs[i]))
            self.stopped[row] = token in self.stop_ids
            if self.stopped[row] or len(self.ids[row]) == self.limits[row]:
                active[i] = False

    def _drop_finished(self, tokens: Tensor, active: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
        """Shrink the batch once an eighth of it has finished; sooner, copying the cache costs more than it saves."""
        if int(active.sum()) > 0.875 * len(active):
            return tokens, active
        keep = active.nonzero().squeeze(1)
        cache.batch_select_indices(keep)
        self.rows, self.mask, self.next_position = self.rows[keep], self.mask[keep], self.next_position[keep]
        return tokens[keep], active[keep]


def _pick(logits: Tensor, streams: list[torch.Generator] | None, temperature: float) -> tuple[Tensor, Tensor]:
    """Next token, the most likely one without streams, and its log-probability. logits (b, V) -> (b,), (b,)."""
    scaled = logits.float() / temperature
    tokens = (scaled if streams is None else scaled + gumbel_noise(scaled, streams)).argmax(-1)
    return tokens, scaled.gather(1, tokens.unsqueeze(1)).squeeze(1) - scaled.logsumexp(-1)


def gumbel_noise(like: Tensor, streams: list[torch.Generator]) -> Tensor:
    """Standard Gumbel noise in the shape of `like` (b, V), float32, row i from `streams[i]`.

    -log(-log(1 - u)), with u drawn as float64: in float32 the smallest u is 2^-24, which words less likely than that
    would share.
    """
    uniform = torch.empty_like(like, dtype=torch.float32)
    row = torch.empty_like(like[0], dtype=torch.float64)
    for target, stream in zip(uniform, streams, strict=True):
        target.copy_(row.uniform_(generator=stream))
    return uniform.neg_().log1p_().neg_().log_().neg_()

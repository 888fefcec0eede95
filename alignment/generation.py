"""Sample from a transformers model: batched, one random stream per sample, finished rows leave the batch.

A sample depends on its own seed and prompt, not on who else is decoded: its uniform numbers are drawn from its own
generator and turned into tokens by the inverse distribution function.
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

from alignment.models import HfModel
from alignment.types import FinishReason


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Token ids out, as sampled."""

    response_ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...]
    finish_reason: FinishReason


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
    max_new_tokens: int,
    temperature: float,
    stop_ids: frozenset[int],
    greedy: bool = False,
    max_batch: int = 64,
) -> list[Sample]:
    """One sample per prompt, in the order given; `max_batch` sequences are decoded together.

    `stop_ids` end a response and belong to it. Log-probabilities are float32 at `temperature` over the whole
    vocabulary, greedy or not.
    """
    # A model that trains with gradient checkpointing is in train mode, in which transformers keeps no cache.
    training = model.model.training
    model.model.eval()
    # Neighbours in length share a batch: left padding is work.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    samples: dict[int, Sample] = {}
    with packed_matrices(model, rows=min(len(prompts), max_batch)):
        for start in range(0, len(order), max_batch):
            rows = order[start : start + max_batch]
            batch = _Batch(model, [prompts[i] for i in rows], [seeds[i] for i in rows], max_new_tokens, stop_ids)
            for i, sample in zip(rows, batch.run(temperature, greedy), strict=True):
                samples[i] = sample
    model.model.train(training)
    return [samples[i] for i in range(len(prompts))]


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


class _Batch:
    """The rows that are decoded together: the cache holds only the unfinished ones."""

    def __init__(
        self,
        model: HfModel,
        prompts: list[Sequence[int]],
        seeds: list[int],
        max_new_tokens: int,
        stop_ids: frozenset[int],
    ) -> None:
        self.model, self.max_new_tokens, self.stop_ids = model, max_new_tokens, stop_ids
        device = model.device
        longest = max(map(len, prompts))
        self.input_ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        self.mask = torch.arange(longest, device=device) >= (longest - lengths).unsqueeze(1)
        self.next_position = lengths.unsqueeze(1)
        self.uniform = torch.stack(
            [
                torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(s), dtype=torch.float64)
                for s in seeds
            ]
        ).to(device)
        self.rows = torch.arange(len(prompts), device=device)
        self.ids: list[list[int]] = [[] for _ in prompts]
        self.logprobs: list[list[float]] = [[] for _ in prompts]
        self.stopped = [False] * len(prompts)

    def run(self, temperature: float, greedy: bool) -> list[Sample]:
        prefill_positions = (self.mask.long().cumsum(-1) - 1).clamp(min=0)
        output = self._forward(self.input_ids, prefill_positions, None)
        active = torch.ones(len(self.ids), dtype=torch.bool, device=self.rows.device)
        for step in range(self.max_new_tokens):
            tokens, logprobs = _pick(output.logits[:, -1], self.uniform[self.rows, step], temperature, greedy)
            self._record(tokens, logprobs, active)
            if step + 1 == self.max_new_tokens or not active.any():
                break
            tokens, active = self._drop_finished(tokens, active, output.past_key_values)
            self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=True)
            output = self._forward(tokens.unsqueeze(1), self.next_position, output.past_key_values)
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
            if token in self.stop_ids:
                self.stopped[row] = True
                active[i] = False

    def _drop_finished(self, tokens: Tensor, active: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
        """Shrink the batch once an eighth of it has finished; sooner, copying the cache costs more than it saves."""
        if int(active.sum()) > 0.875 * len(active):
            return tokens, active
        keep = active.nonzero().squeeze(1)
        cache.batch_select_indices(keep)
        self.rows, self.mask, self.next_position = self.rows[keep], self.mask[keep], self.next_position[keep]
        return tokens[keep], active[keep]


def _pick(logits: Tensor, uniform: Tensor, temperature: float, greedy: bool) -> tuple[Tensor, Tensor]:
    """Next token and its log-probability. logits (b, V), uniform (b,) in [0, 1) -> (b,), (b,)."""
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    if greedy:
        tokens = logprobs.argmax(-1)
    else:
        # float64: with 50k entries a float32 running sum would move the borders between tokens.
        cumulative = logprobs.double().exp().cumsum(-1)
        threshold = uniform.unsqueeze(1) * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)
    return tokens, logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)

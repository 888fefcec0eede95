"""Supervised fine-tuning: the likelihood of what the assistant said, full parameters or any adapter."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from alignment.adapters import TrainingMethod
from alignment.batching import micro_batches, sft_batch
from alignment.distributed import Ranks
from alignment.engines.base import Engine
from alignment.forward import response_logprobs
from alignment.learners.base import Learner, missing_passes
from alignment.losses import sft_loss
from alignment.models import CausalModel, HfModel
from alignment.packing import MicroBatchLimit
from alignment.types import SftExample


class SftLearner(Learner):
    """One optimiser step per batch; the loss is the mean over all its trained tokens, whatever the micro-batches."""

    def __init__(
        self,
        model: CausalModel,
        engine: Engine,
        *,
        micro_batch_limit: MicroBatchLimit,
        method: TrainingMethod | None = None,
        neftune_alpha: float = 0.0,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        """
        Args:
            neftune_alpha: size of the noise on embeddings, see `embedding_noise`; 0 adds none.
        """
        super().__init__(model, engine, micro_batch_limit=micro_batch_limit, method=method, device=device)
        self.neftune_alpha, self.seed = neftune_alpha, seed

    def update(self, examples: Sequence[SftExample], *, step: int) -> dict[str, float]:
        """Metrics: `sft/loss` in nats per token, `sft/tokens`, `sft/trained_tokens`, the optimiser's, the method's."""
        tally = self._begin()
        num_trained = sum(example.num_trained for example in examples)
        lengths = torch.tensor([len(example.input_ids) for example in examples])
        for index in self._micro_batches(lengths):
            chosen = [examples[i] for i in index.tolist()]
            ids, mask, response = sft_batch(chosen, self.device)
            logprobs, _ = response_logprobs(
                self.model, ids, mask, response, temperature=1.0, noise=self._noise(chosen, step)
            )
            loss, metrics = sft_loss(logprobs, response, denominator=num_trained)
            self.engine.backward(loss)
            tally.add(metrics)
        tally.end_minibatch()
        tally.add({"tokens": float(lengths.sum()), "trained_tokens": float(num_trained)})
        return self._finish(tally, "sft")

    def _noise(self, examples: Sequence[SftExample], step: int) -> Tensor | None:
        if not self.neftune_alpha:
            return None
        assert isinstance(self.model, HfModel)
        width = self.model.model.get_input_embeddings().embedding_dim
        return embedding_noise(examples, width, alpha=self.neftune_alpha, seed=self.seed, step=step).to(self.device)

    @torch.no_grad()
    def nll(self, examples: Sequence[SftExample]) -> list[float]:
        """Negative log-likelihood of each example, summed over its trained tokens, in the order given."""
        return sum_nll(
            self.model, examples, limit=self.micro_batch_limit, device=self.device, lockstep=self.engine.lockstep
        )


@torch.no_grad()
def sum_nll(
    model: CausalModel,
    examples: Sequence[SftExample],
    *,
    limit: MicroBatchLimit,
    device: torch.device | str = "cpu",
    lockstep: Ranks | None = None,
) -> list[float]:
    """As `SftLearner.nll`, of any model. `lockstep`: as for `alignment.learners.base.per_response`."""
    sums = torch.zeros(len(examples), dtype=torch.float64)
    lengths = torch.tensor([len(example.input_ids) for example in examples])
    batches = micro_batches(torch.arange(len(examples)), lengths, limit)
    nothing = torch.zeros(1, 2, dtype=torch.int64, device=device)
    for _ in range(missing_passes(len(batches), lockstep)):
        response_logprobs(model, nothing, nothing == 0, nothing == 1, temperature=1.0)
    for index in batches:
        ids, mask, response = sft_batch([examples[i] for i in index.tolist()], device)
        logprobs, _ = response_logprobs(model, ids, mask, response, temperature=1.0)
        sums[index] = -logprobs.double().sum(1).cpu()
    return sums.tolist()


def embedding_noise(examples: Sequence[SftExample], width: int, *, alpha: float, seed: int, step: int) -> Tensor:
    """Uniform noise of size alpha / sqrt(L d) for the embeddings of sequences of L tokens (NEFTune, Jain 2023, arXiv
    2310.05914, algorithm 1).

    An example's noise is drawn from (seed, step, its id) alone, so that it does not depend on who shares its batch.

    Returns:
        (B, T, d) float32 on the CPU, zeros at padding.
    """
    noise = torch.zeros(len(examples), max(len(example.input_ids) for example in examples), width)
    for row, example in zip(noise, examples, strict=True):
        digest = hashlib.sha256(f"{seed}/{step}/{example.id}/embedding".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        length = len(example.input_ids)
        size = alpha / math.sqrt(length * width)
        row[:length] = size * (2 * torch.rand(length, width, generator=generator) - 1)
    return noise

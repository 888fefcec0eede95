"""Pairs of answers teach a policy directly: DPO and its kin."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from alignment.adapters import TrainingMethod
from alignment.distributed import Ranks
from alignment.engines.base import Engine
from alignment.learners.answers import Answer, answer_logprobs, forward_batches, refuse_unshared, sharing_limit
from alignment.learners.base import Learner
from alignment.logprobs import sequence_logps
from alignment.models import CausalModel
from alignment.packing import MicroBatchLimit
from alignment.preference_losses import counted_lengths, length_desensitised_logps
from alignment.preference_objectives import PairLogps, PreferenceObjective
from alignment.types import PreferencePair

RefLogps = Sequence[Sequence[float]]
"""Of each pair the reference's log-probabilities of the chosen and of the rejected answer."""


class DpoLearner(Learner):
    """One optimiser step per batch of pairs; both answers of a pair share a forward."""

    def __init__(
        self,
        model: CausalModel,
        engine: Engine,
        *,
        micro_batch_limit: MicroBatchLimit,
        objective: PreferenceObjective | None = None,
        method: TrainingMethod | None = None,
        share_prompts: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        """
        Args:
            micro_batch_limit: its rows are pairs.
            method: what is told of every update.
            share_prompts: compute the prompt of a pair once, see `alignment.shared_prompts`.

        Raises:
            ValueError: share_prompts with a model whose answers would then differ.
        """
        if share_prompts:
            refuse_unshared(model)
            micro_batch_limit = sharing_limit(micro_batch_limit)
        super().__init__(model, engine, micro_batch_limit=micro_batch_limit, method=method, device=device)
        self.objective = objective or PreferenceObjective()
        self.share_prompts = share_prompts

    def update(self, pairs: Sequence[PreferencePair], ref_logps: RefLogps | None, *, step: int) -> dict[str, float]:
        """One step; the loss is the mean over all pairs whatever the micro-batches.

        Args:
            ref_logps: what `pair_logps` says of the frozen reference with the objective's `length_alpha`, computed
                now or before the run; None where the objective has no use for one.

        Returns:
            `dpo/loss`, `dpo/rewards/chosen`, `dpo/rewards/rejected`, `dpo/accuracy`, `dpo/margin`,
            `dpo/logps/chosen`, `dpo/logps/rejected`, the optimiser's, the method's.

        Raises:
            ValueError: the reference is missing, or is that of another number of pairs.
        """
        reference = _reference(pairs, ref_logps, needed=self.objective.uses_reference)
        tally = self._begin()
        num_tokens = float(sum(len(pair.chosen_ids) for pair in pairs))
        for index in self._micro_batches(_lengths(pairs, self.share_prompts)):
            chosen, alpha = [pairs[i] for i in index.tolist()], self.objective.length_alpha
            logps = _pair_logps(self.model, chosen, alpha, self.device, self.share_prompts)
            if reference is not None:
                ref_chosen, ref_rejected = reference[index].to(self.device).unbind(1)
                logps = dataclasses.replace(logps, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
            loss, metrics = self.objective.loss(logps, denominator=len(pairs), num_tokens=num_tokens)
            self.engine.backward(loss)
            tally.add(metrics)
        tally.end_minibatch()
        return self._finish(tally, "dpo")

    def logps(self, pairs: Sequence[PreferencePair]) -> list[tuple[float, float]]:
        """`pair_logps` of this model."""
        return pair_logps(
            self.model,
            pairs,
            limit=self.micro_batch_limit,
            length_alpha=self.objective.length_alpha,
            device=self.device,
            lockstep=self.engine.lockstep,
            share_prompts=self.share_prompts,
        )


@torch.no_grad()
def pair_logps(
    model: CausalModel,
    pairs: Sequence[PreferencePair],
    *,
    limit: MicroBatchLimit,
    length_alpha: float = 1.0,
    device: torch.device | str = "cpu",
    lockstep: Ranks | None = None,
    share_prompts: bool = False,
) -> list[tuple[float, float]]:
    """Log-probabilities of the chosen and the rejected answer of each pair, in the order given: of any model, a
    reference among them. `lockstep`: as for `alignment.learners.base.per_response`."""
    found = torch.zeros(len(pairs), 2)
    limit = sharing_limit(limit) if share_prompts else limit
    for index in forward_batches(model, _lengths(pairs, share_prompts), limit, device, lockstep):
        logps = _pair_logps(model, [pairs[i] for i in index.tolist()], length_alpha, device, share_prompts)
        found[index] = torch.stack([logps.chosen, logps.rejected], 1).cpu()
    return [(chosen, rejected) for chosen, rejected in found.tolist()]


def held_out_metrics(
    objective: PreferenceObjective,
    pairs: Sequence[PreferencePair],
    logps: RefLogps,
    ref_logps: RefLogps | None,
) -> dict[str, float]:
    """`validation/NAME` of loss, accuracy, margin and rewards of a whole set of pairs, from what `pair_logps` says of
    both models. An sft term is then weighted as `length_alpha` weighs answers, and is their mean."""
    reference = _reference(pairs, ref_logps, needed=objective.uses_reference)
    chosen, rejected = torch.tensor(logps).unbind(1)
    lengths = counted_lengths(*answer_lengths_of(pairs), alpha=objective.length_alpha)
    ref = () if reference is None else reference.unbind(1)
    found = PairLogps(chosen, rejected, *lengths, *ref)
    loss, metrics = objective.loss(found, denominator=len(pairs), num_tokens=float(lengths[0].sum()))
    return {f"validation/{name}": float(value) for name, value in {**metrics, "loss": loss}.items()}


def _pair_logps(
    model: CausalModel,
    pairs: Sequence[PreferencePair],
    length_alpha: float,
    device: torch.device | str,
    share_prompts: bool,
) -> PairLogps:
    answers: list[Answer] = [(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
    answers += [(pair.prompt_ids, pair.rejected_ids) for pair in pairs]
    logprobs, response = answer_logprobs(model, answers, device, share_prompts=share_prompts)
    chosen_lengths, rejected_lengths = answer_lengths_of(pairs, device)
    chosen, rejected = sequence_logps(logprobs, response).chunk(2)
    if length_alpha == 1:
        return PairLogps(chosen, rejected, chosen_lengths, rejected_lengths)
    common = torch.minimum(chosen_lengths, rejected_lengths).repeat(2)
    weighted = length_desensitised_logps(logprobs, response, common, alpha=length_alpha).chunk(2)
    counted = counted_lengths(chosen_lengths, rejected_lengths, alpha=length_alpha)
    return PairLogps(weighted[0], weighted[1], *counted, chosen_sft=chosen)


def answer_lengths_of(pairs: Sequence[PreferencePair], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """(P,) tokens of the chosen and of the rejected answers."""
    chosen = torch.tensor([len(pair.chosen_ids) for pair in pairs], device=device)
    return chosen, torch.tensor([len(pair.rejected_ids) for pair in pairs], device=device)


def _lengths(pairs: Sequence[PreferencePair], share_prompts: bool) -> Tensor:
    """(P, 2) tokens of both sequences of each pair, or (P,) of its prompt and both answers behind it."""
    if share_prompts:
        return torch.tensor([sum(map(len, (p.prompt_ids, p.chosen_ids, p.rejected_ids))) for p in pairs])
    return torch.tensor([[len(ids) for ids in pair.sequences] for pair in pairs]).view(-1, 2)


def _reference(pairs: Sequence[PreferencePair], ref_logps: RefLogps | None, *, needed: bool) -> Tensor | None:
    """(P, 2), or None where the objective needs none."""
    if not needed:
        return None
    if ref_logps is None or len(ref_logps) != len(pairs):
        got = "none" if ref_logps is None else f"{len(ref_logps)}"
        raise ValueError(f"ref_logps: got {got} for {len(pairs)} pairs, expected two numbers for each; compute them")
    return torch.tensor(ref_logps)

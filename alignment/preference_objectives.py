"""From the log-probabilities of pairs of answers to one loss: terms with weights, each of its own kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignment.aggregation import Metrics
from alignment.preference_losses import chosen_sft_loss, cpo_loss, dpo_loss, orpo_loss, simpo_loss
from alignment.preference_terms import Term, refuse_odd_terms, use_reference


@dataclass(frozen=True, slots=True)
class PairLogps:
    """What a loss of P pairs reads, (P,) each."""

    chosen: Tensor
    rejected: Tensor
    """Sums over the tokens of an answer; with `length_alpha` below 1, weighted ones."""
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    """Tokens that those sums count, see `counted_lengths`."""
    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None
    chosen_sft: Tensor | None = None
    """Sums that a length_alpha left alone; None where they are `chosen`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferenceObjective:
    """How pairs are learnt."""

    terms: Sequence[Term] = (Term(),)
    beta: float = 0.1
    label_smoothing: float = 0.0
    """Of sigmoid, robust, cpo and simpo: the share of pairs whose preference may be the wrong way round."""
    margin: float = 1.0
    """By how much simpo wants beta times the gap to be positive."""
    length_alpha: float = 1.0
    """Weight of an answer's tokens beyond the length of the other, see `length_desensitised_logps`."""

    def __post_init__(self) -> None:
        refuse_odd_terms(self.terms)

    @property
    def uses_reference(self) -> bool:
        return use_reference(self.terms)

    def loss(self, logps: PairLogps, *, denominator: float, num_tokens: float) -> tuple[Tensor, Metrics]:
        """`(loss, metrics)` of a micro-batch.

        Args:
            denominator: global number of pairs.
            num_tokens: global number of tokens of chosen answers.

        Returns:
            The sum of the weighted terms, and the metrics of the first that compares answers, with `loss/KIND` of each
            where there are several.
        """
        total = torch.zeros((), device=logps.chosen.device)
        metrics: Metrics = {}
        parts: Metrics = {}
        for term in self.terms:
            loss, own = self._term(term, logps, denominator, num_tokens)
            total = total + term.weight * loss
            parts[f"loss/{term.kind}" + "_per_token" * term.per_token] = loss.detach()
            metrics = metrics or own
        return total, {"loss": total.detach(), **metrics, **(parts if len(parts) > 1 else {})}

    def _term(self, term: Term, logps: PairLogps, count: float, num_tokens: float) -> tuple[Tensor, Metrics]:
        beta, smoothing = self.beta, self.label_smoothing
        both, lengths = (logps.chosen, logps.rejected), (logps.chosen_lengths, logps.rejected_lengths)
        if term.kind == "sft":
            plain = logps.chosen if logps.chosen_sft is None else logps.chosen_sft
            return chosen_sft_loss(plain, logps.chosen_lengths, denominator=num_tokens), {}
        if term.kind == "simpo":
            return simpo_loss(
                *both, *lengths, beta=beta, margin=self.margin, label_smoothing=smoothing, denominator=count
            )
        if term.kind == "orpo":
            return orpo_loss(*both, *lengths, beta=beta, denominator=count)
        if term.kind == "cpo":
            return cpo_loss(*both, beta=beta, label_smoothing=smoothing, denominator=count)
        if logps.ref_chosen is None or logps.ref_rejected is None:
            raise ValueError(f"reference: got no log-probabilities with {term.kind}, expected them; hand them in")
        return dpo_loss(
            *both,
            logps.ref_chosen,
            logps.ref_rejected,
            beta=beta,
            variant=term.kind,
            label_smoothing=smoothing if term.kind in ("sigmoid", "robust") else 0.0,
            chosen_lengths=lengths[0] if term.per_token else None,
            rejected_lengths=lengths[1] if term.per_token else None,
            denominator=count,
        )

"""The policy while it learns from preferences, beside the reference that it is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from actors.fine_tuned import FineTunedActor
from actors.loading import causal_model, split_frozen
from actors.worker import Actor, UpdateOnce
from alignment.adapters import TrainingMethod
from alignment.candidates import candidate_logps
from alignment.config import DpoConfig, KtoConfig, LiveTrainingConfig, PreferenceStepsConfig
from alignment.config.preference import ReferenceConfig
from alignment.distributed import Ranks
from alignment.engines.base import Engine
from alignment.forward import response_logprobs
from alignment.judgements import LabelledAnswer
from alignment.learners.answers import answer_logps
from alignment.learners.base import per_response
from alignment.learners.dpo import DpoLearner, RefLogps, pair_logps
from alignment.learners.kto import BcoLearner, KtoLearner
from alignment.models import HfModel
from alignment.preference_objectives import PreferenceObjective
from alignment.preference_terms import Term
from alignment.reference import AdapterReference, FrozenReference, Reference
from alignment.shared_prompts import Group, shares_prompts
from alignment.types import PreferencePair, Rollout


class PreferenceActor(FineTunedActor):
    """What actors of pairs and of labels share: the reference, live beside the policy."""

    training: PreferenceStepsConfig | LiveTrainingConfig

    def __init__(self, *, reference: ReferenceConfig, **settings: Any) -> None:
        """`settings`: of `LearningActor`."""
        super().__init__(**settings)
        self.reference_config = reference
        self._followed = UpdateOnce()

    def setup(self, peers: Mapping[str, Actor]) -> None:
        super().setup(peers)
        self.reference: Reference = (
            AdapterReference(self.model)
            if self.training.adapter.enabled
            else FrozenReference(self.model, self._load_frozen)
        )

    def follow(self, *, step: int) -> None:
        """Move the reference to where the policy is after `step` steps, as far as the config says."""
        self._followed(step, lambda: self.reference.follow(self.reference_config.sync_share))

    def release_reference(self) -> None:
        """For who has all its numbers."""
        self.reference.release()

    def candidate_logps(self, groups: Sequence[Group], *, row_tokens: int) -> list[list[float]]:
        """Of each answer behind each prompt, as `alignment.candidates` has it. The whole model must be here."""
        return self._candidate_logps(self.model, groups, row_tokens)

    def ref_candidate_logps(self, groups: Sequence[Group], *, row_tokens: int) -> list[list[float]]:
        """The same of the reference, in rows of the same make."""
        with self.reference.model() as model:
            return self._candidate_logps(model, groups, row_tokens)

    def _candidate_logps(self, model: HfModel, groups: Sequence[Group], row_tokens: int) -> list[list[float]]:
        share, device = shares_prompts(model), self.device
        return [
            candidate_logps(model, group, share_prompt=share, row_tokens=row_tokens, device=device).tolist()
            for group in groups
        ]

    def logprobs(self, rollouts: Sequence[Rollout], *, temperature: float) -> list[Tensor]:
        """Per rollout (R_i,) float32, of its response tokens."""
        return self._logprobs(self.model, rollouts, temperature, self.learner.engine.lockstep)

    def start_logprobs(self, rollouts: Sequence[Rollout], *, temperature: float) -> list[Tensor]:
        """The same of the model that the run began with, see `alignment.reference.Reference.start`."""
        with self.reference.start() as model:
            return self._logprobs(model, rollouts, temperature, self._together)

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.reference.save(folder, write=self.ranks.rank == 0)

    def load(self, folder: Path) -> None:
        super().load(folder)
        self.reference.load(folder)

    @property
    def _together(self) -> Ranks | None:
        """The ranks that forwards of the reference are made with."""
        return self.learner.engine.lockstep if self.training.adapter.enabled else self.lockstep

    def _logprobs(
        self, model: HfModel, rollouts: Sequence[Rollout], temperature: float, together: Ranks | None
    ) -> list[Tensor]:
        def forward(ids: Tensor, mask: Tensor, response: Tensor) -> Tensor:
            return response_logprobs(model, ids, mask, response, temperature=temperature)[0]

        limit = self.training.micro_batch_limit(model.layout)
        return per_response(rollouts, forward, limit=limit, device=self.device, lockstep=together)

    def _load_frozen(self) -> HfModel:
        model = causal_model(self.model_path, self.model_config, self.device, frozen=True)
        return split_frozen(model, self.lockstep)


class DpoActor(PreferenceActor):
    """Learns from pairs of answers."""

    learner: DpoLearner

    def __init__(self, *, dpo: DpoConfig, **settings: Any) -> None:
        """`settings`: of `PreferenceActor`."""
        super().__init__(**settings)
        self.dpo = dpo

    def make_learner(self, engine: Engine, method: TrainingMethod | None) -> DpoLearner:
        return DpoLearner(
            self.model,
            engine,
            micro_batch_limit=self.training.micro_batch_limit(self.model.layout),
            objective=objective_of(self.dpo),
            method=method,
            share_prompts=self.dpo.share_prompts,
            device=self.device,
        )

    def update(
        self, pairs: Sequence[PreferencePair], ref_logps: RefLogps | None = None, *, step: int
    ) -> dict[str, float]:
        return self._once(step, lambda: self.learner.update(pairs, ref_logps, step=step))

    def logps(self, pairs: Sequence[PreferencePair]) -> list[tuple[float, float]]:
        """Of the chosen and of the rejected answer of each pair."""
        return self.learner.logps(pairs)

    def ref_logps(self, pairs: Sequence[PreferencePair]) -> list[tuple[float, float]]:
        """The same of the reference."""
        with self.reference.model() as model:
            return pair_logps(
                model,
                pairs,
                limit=self.training.micro_batch_limit(model.layout),
                length_alpha=self.dpo.length_alpha,
                device=self.device,
                lockstep=self._together,
                share_prompts=self.dpo.share_prompts,
            )


class KtoActor(PreferenceActor):
    """Learns from labelled answers, by KTO or BCO."""

    learner: KtoLearner | BcoLearner

    def __init__(self, *, kto: KtoConfig, **settings: Any) -> None:
        """`settings`: of `PreferenceActor`. `kto`: with the weights to be used."""
        super().__init__(**settings)
        self.kto = kto

    def make_learner(self, engine: Engine, method: TrainingMethod | None) -> KtoLearner | BcoLearner:
        kind = KtoLearner if self.kto.loss == "kto" else BcoLearner
        return kind(
            self.model,
            engine,
            micro_batch_limit=self.training.micro_batch_limit(self.model.layout),
            beta=self.kto.beta,
            desirable_weight=self.kto.desirable_weight,
            undesirable_weight=self.kto.undesirable_weight,
            method=method,
            share_prompts=self.kto.share_prompts,
            device=self.device,
        )

    def update(self, records: Sequence[LabelledAnswer], *ref_logps: Sequence[float], step: int) -> dict[str, float]:
        """`ref_logps`: of the records, and for KTO of the mismatched ones."""
        return self._once(step, lambda: self.learner.update(records, *ref_logps, step=step))

    def logps(self, records: Sequence[LabelledAnswer]) -> list[float]:
        """Of each answer."""
        return self.learner.logps(records)

    def ref_logps(self, records: Sequence[LabelledAnswer]) -> list[float]:
        """The same of the reference."""
        with self.reference.model() as model:
            return answer_logps(
                model,
                [(record.prompt_ids, record.answer_ids) for record in records],
                limit=self.training.micro_batch_limit(model.layout),
                device=self.device,
                lockstep=self._together,
                share_prompts=self.kto.share_prompts,
            )


def objective_of(dpo: DpoConfig) -> PreferenceObjective:
    return PreferenceObjective(
        terms=tuple(Term(kind=term.kind, weight=term.weight, per_token=term.per_token) for term in dpo.terms),
        beta=dpo.beta,
        label_smoothing=dpo.label_smoothing,
        margin=dpo.margin,
        length_alpha=dpo.length_alpha,
    )

"""The policy while it learns from examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from actors.fine_tuned import FineTunedActor
from actors.loading import original_weights
from alignment import adapters
from alignment.adapters import TrainingMethod
from alignment.config import SftTrainingConfig
from alignment.engines.base import Engine
from alignment.forward import run_singly
from alignment.learners.sft import SftLearner
from alignment.types import SftExample


class SftActor(FineTunedActor):
    """Fine-tunes a language model on examples, full or by an adapter."""

    learner: SftLearner
    training: SftTrainingConfig

    def __init__(self, *, calibration: Sequence[SftExample] = (), **settings: Any) -> None:
        """
        Args:
            calibration: what starts the factors over a four-bit base; see `alignment.adapters.rounding`.
            settings: of `LearningActor`.
        """
        super().__init__(**settings)
        self.calibration = calibration

    def make_learner(self, engine: Engine, method: TrainingMethod | None) -> SftLearner:
        return SftLearner(
            self.model,
            engine,
            micro_batch_limit=self.training.micro_batch_limit(self.model.layout),
            neftune_alpha=self.training.neftune_alpha,
            method=method,
            seed=self.seed,
            device=self.device,
        )

    def calibrate(self) -> Callable[[], None] | None:
        return self._absorb_rounding if self.calibration else None

    def _absorb_rounding(self) -> None:
        adapters.absorb_rounding(
            self.model.model,
            lambda: run_singly(self.model, [example.input_ids for example in self.calibration]),
            original_weights(self.model_path, self.model_config.revision),
            seed=self.seed,
        )

    def update(self, examples: Sequence[SftExample], *, step: int) -> dict[str, float]:
        return self._once(step, lambda: self.learner.update(examples, step=step))

    def nll(self, examples: Sequence[SftExample]) -> list[float]:
        """Summed over the trained tokens of each example."""
        return self.learner.nll(examples)

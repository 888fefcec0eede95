"""Runs on pairs and on labels of tiny models in this process, to be cut and taken up again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tiny_preferences import labels_of, pairs_of
from tiny_runs import TinyRun, settings_of

from actors.build import dpo_actors, kto_actors, preference_role
from actors.preference_training import objective_of
from alignment.config import ClusterConfig, DpoRunConfig, KtoRunConfig
from alignment.data.split import Split
from alignment.data.tasks import Tasks
from alignment.loops.preference_stages import LabelStage, PairStage
from alignment.loops.preferences import train_preferences
from alignment.types import PreferencePair


def pair_tasks(train: int = 8, held_out: int = 6) -> Tasks[PreferencePair]:
    return Tasks({"pairs": Split(pairs_of(train), pairs_of(held_out, seed=9))}, None, seed=1)


def label_tasks(train: int = 10, held_out: int = 8) -> Tasks[Any]:
    return Tasks({"labels": Split(labels_of(train), labels_of(held_out, seed=9))}, None, seed=1)


class PreferenceRun(TinyRun):
    """A run of `train_preferences`; sections beside `run` and `model` are given by name."""

    part = "policy"
    first: list[Any] | None = None
    """What the reference said of the held-out parts before the first step."""

    def __init__(
        self,
        model: Path,
        folder: Path,
        tasks: Tasks[Any],
        *,
        run: dict | None = None,
        training: dict | None = None,
        **sections: Any,
    ) -> None:
        settings = {**settings_of(model, run, training or {}), **sections}
        if isinstance(tasks.train[0], PreferencePair):
            config: Any = DpoRunConfig.model_validate(settings)
            self.stage: Any = PairStage(objective_of(config.dpo))
            actors = dpo_actors(config, ClusterConfig(), model_path=str(model))
        else:
            config = KtoRunConfig.model_validate(settings)
            self.stage = LabelStage(loss=config.kto.loss, beta=config.kto.beta)
            actors = kto_actors(config, ClusterConfig(), model_path=str(model))
        super().__init__(config, actors, folder, tasks)
        self.role = preference_role(self.groups)

    def ask(self, records: Sequence[Any]) -> list[Any]:
        """The live reference."""
        return self.role.ref_logps(records).result()

    def train(
        self,
        *,
        patience: float = float("inf"),
        num_steps: int | None = None,
        reference: Callable[[Sequence[Any]], Any] | None = None,
    ) -> None:
        """`reference`: who is asked in place of the live one."""
        asks = None if self.config.reference.mode == "none" else reference or self.ask
        if self.first is None:
            self.first = self._ask_first(asks)
        train_preferences(
            self.cut_to(num_steps),
            self.data,
            self.data.held_out,
            stage=self.stage,
            policy=self.role,
            reference=asks,
            held_out_reference=self.first,
            run=self.run,
            state=self.state,
            patience=patience,
        )

    def resume(self) -> None:
        """The first numbers are those of before the first step, which a recipe keeps."""
        self.first = self._ask_first(None if self.config.reference.mode == "none" else self.ask)
        super().resume()

    def _ask_first(self, asks: Callable[[Sequence[Any]], Any] | None) -> list[Any]:
        return [asks(part) for part in self.stage.parts(self.data.held_out)] if asks else []

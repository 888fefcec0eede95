"""What learns: a model, its optimiser and its learner, from config to checkpoint. Every actor that trains is one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from actors.loading import Learner, Trained, load_trained, make_trainable, save_trained, tokenizer_of_text
from actors.worker import WHOLE, Actor, UpdateOnce
from alignment.adapters import TrainingMethod
from alignment.config import ModelConfig
from alignment.config.cluster import RoleConfig
from alignment.engines.base import Engine
from alignment.models import HfModel


class LearningActor(Actor):
    """A kind of it says in `load_model` and `make_learner` what learns, and from what."""

    learns = True
    model: HfModel
    """Loaded by `setup`, as are `learner` and its optimiser."""
    learner: Learner
    training: Trained

    def __init__(
        self,
        *,
        model_path: str,
        model: ModelConfig,
        training: Trained,
        total_updates: int,
        seed: int,
        device: str = "cpu",
        machines: RoleConfig = WHOLE,
    ) -> None:
        """
        Args:
            total_updates: of the optimiser in the whole run, for its schedule.
            machines: of the cluster's config, which engine trains.
        """
        self.model_path, self.model_config, self.training = model_path, model, training
        self.total_updates, self.seed, self.device = total_updates, seed, device
        self.machines = machines

    def setup(self, peers: Mapping[str, Actor]) -> None:
        self.model = self.load_model()
        engine, method = make_trainable(
            self.model,
            self.model_config,
            self.training,
            total_updates=self.total_updates,
            seed=self.seed,
            ranks=self.ranks,
            machines=self.machines,
            device=self.device,
            tokenizer=tokenizer_of_text(self.training.adapter, self.model_path, self.model_config.revision),
            calibrate=self.calibrate(),
        )
        self.learner = self.make_learner(engine, method)
        self._once = UpdateOnce()

    def load_model(self) -> HfModel:
        """What learns, without its adapter."""
        raise NotImplementedError

    def make_learner(self, engine: Engine, method: TrainingMethod | None) -> Learner:
        """Of the model that is loaded by then."""
        raise NotImplementedError

    def calibrate(self) -> Callable[[], None] | None:
        """What moves the adapter to where it begins, if anything does."""
        return None

    def save(self, folder: Path) -> None:
        """Weights in Hugging Face format (an adapter in peft's) and the optimiser."""
        save_trained(self.model, self.learner, folder, self.model_path)

    def load(self, folder: Path) -> None:
        load_trained(self.model, self.learner, folder)

"""One reward model as a reward actor hosts it: text goes in, standardised scores come out."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from actors.loading import scalar_model, split_frozen
from alignment import models
from alignment.config import ModelConfig
from alignment.data.chat import encode_conversation, eos_ids_of_model, load_tokenizer
from alignment.distributed import Ranks
from alignment.learners.reward_model import score_sequences
from alignment.packing import Layout, MicroBatchLimit
from alignment.types import Rollout

STATISTICS_FILE = "score_statistics.json"
Scale = tuple[float, float]
"""Mean and standard deviation of a model's scores of real answers."""
RAW: Scale = (0.0, 1.0)
"""Of a model that came without them."""


class HostedModel:
    """A model with a tokenizer, a template, positions and a scale of its own."""

    def __init__(self, own: ModelConfig, *, scale: Scale, device: str, lockstep: Ranks | None) -> None:
        """
        Args:
            own: of the model's path and revision.
            lockstep: the ranks that it is split over, if any.
        """
        self.path, self.device, self.lockstep = own.path, device, lockstep
        self.mean, self.std = scale
        self.tokenizer = load_tokenizer(own.path, own.revision)
        self.eos_ids = eos_ids_of_model(self.tokenizer, own.path, own.revision)
        self.model = split_frozen(scalar_model(own.path, own, device, head="require", frozen=True), lockstep)
        self.num_positions = models.num_positions(self.model.model.config)

    def score(
        self, rollouts: Sequence[Rollout], *, limit_of: Callable[[Layout], MicroBatchLimit]
    ) -> list[float | None]:
        """The answer is read as a finished turn, end token included, exactly as the training pairs were.

        Whether it really finished is the missing-EOS penalty's business. None for a text that its own tokenizer makes
        longer than the model's positions.

        Raises:
            ValueError: a score that is NaN or infinite.
        """
        sequences = [
            encode_conversation(
                self.tokenizer,
                [*rollout.prompt.messages, {"role": "assistant", "content": rollout.response}],
                eos_ids=self.eos_ids,
            )[0]
            for rollout in rollouts
        ]
        fits = [self.num_positions is None or len(sequence) <= self.num_positions for sequence in sequences]
        raw = score_sequences(
            self.model,
            [sequence for sequence, fit in zip(sequences, fits, strict=True) if fit],
            limit=limit_of(self.model.layout),
            device=self.device,
            lockstep=self.lockstep,
        )
        if odd := [score for score in raw if not math.isfinite(score)]:
            raise ValueError(
                f"reward model {self.path!r}: got {odd[0]} as the score of {len(odd)} of {len(raw)} answers, expected "
                "finite numbers; its weights or its dtype do not hold: train it again, or set model.dtype to float32"
            )
        scores = iter(raw)
        return [(next(scores) - self.mean) / self.std if fit else None for fit in fits]


def scales_of(paths: Sequence[str], *, standardize: bool) -> list[Scale]:
    """Of the models of an ensemble, or of one alone.

    Raises:
        ValueError: a folder that is named twice; statistics that are broken, or that some of the models lack.
    """
    real = [os.path.realpath(path) for path in paths]
    if twice := [path for path, one in zip(paths, real, strict=True) if real.count(one) > 1]:
        raise ValueError(
            f"reward.ensemble.models: got {', '.join(twice)}, which is one model, expected each once, reward.model "
            "among them: a model agrees with itself whatever it says; name another one, or take it out"
        )
    if not standardize:
        return [RAW] * len(paths)
    found = [load_statistics(Path(path)) for path in paths]
    lacking = [path for path, scale in zip(paths, found, strict=True) if scale is None]
    if lacking and len(lacking) < len(paths):
        raise ValueError(
            f"reward.ensemble.models: got {', '.join(lacking)} without {STATISTICS_FILE}, which the others have, "
            "expected all of them on one scale; train it here, or set reward.standardize_model to false if the raw "
            "scores are on one scale"
        )
    return [scale or RAW for scale in found]


def load_statistics(folder: Path) -> Scale | None:
    """What a model came with; None where it came without.

    Raises:
        ValueError: a file that is broken, or numbers that nothing can be standardised with.
    """
    file = folder / STATISTICS_FILE
    if not file.is_file():
        return None
    remedy = "train the reward model again, or set reward.standardize_model to false"
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        mean, std = float(saved["mean"]), float(saved["std"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: got a broken file ({type(error).__name__}: {error}), expected JSON with mean and std; {remedy}"
        ) from error
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise ValueError(
            f"{file}: got mean {mean:g} and std {std:g}, expected finite numbers and a std above 0; {remedy}"
        )
    return mean, std

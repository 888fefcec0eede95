"""Runs in rounds of a tiny model in this process, to be interrupted anywhere and taken up again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tiny_runs import TinyRun

from actors.build import iterative_actors, iterative_roles
from alignment.config import ClusterConfig, IterativeRunConfig
from alignment.data.chat import load_tokenizer
from alignment.data.preferences import encode_pairs
from alignment.data.prompts import load_prompts
from alignment.data.reading import Encoder
from alignment.loops.evaluation import evaluate
from alignment.loops.iterative import IterativeState, open_rounds, rank_round, train_in_rounds

LETTERS = {"functions": [{"name": "form:matches", "part": "letters"}]}


def write_letter_prompts(path: Path, count: int = 24, pattern: str = "[a-z]") -> Path:
    """Prompts whose answers `LETTERS` wants to have a small letter, unless the pattern says otherwise."""
    rows = [{"question": f"What about topic {i}?", "pattern": pattern} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def settings_of_rounds(tiny: Path, prompts: Path, **sections: Any) -> dict[str, Any]:
    """Three rounds of two steps; whole sections are replaced by name."""
    return {
        "run": {"num_steps": 6, "checkpoint_every": 1, "trackers": []},
        "data": {"source": {"path": str(prompts)}, "held_out": 4},
        "model": {"path": f"{tiny}/policy"},
        "reward": LETTERS,
        "rollout": {"engine": "transformers", "max_new_tokens": 4},
        "ranking": {"num_samples_per_prompt": 4, "batch_size": 3, "on_cut": "keep"},
        "rounds": {"prompts_per_round": 8, "steps_per_round": 2, "replay_share": 0.25, "evaluate_every": 2},
        "training": {"batch_size": 4, "adapter": {"r": 4}, "optimizer": {"lr": 5e-3}},
        **sections,
    }


class RoundRun(TinyRun):
    """A run of `train_in_rounds`, ranked by its reward unless `judge` says otherwise."""

    part = "policy"

    def __init__(self, tiny: Path, prompts: Path, folder: Path, **sections: Any) -> None:
        config = IterativeRunConfig.model_validate(settings_of_rounds(tiny, prompts, **sections))
        self.tokenizer = load_tokenizer(config.model.path)
        self.actors = iterative_actors(config, ClusterConfig(colocate=()), model_path=config.model.path)
        super().__init__(config, self.actors, folder, load_prompts(config.data, self.tokenizer))
        self.roles = iterative_roles(self.groups)
        self.role, self.state = self.roles.policy, IterativeState()

    def judge(self, number, answered):
        return rank_round(self.config, answered)

    def held_out(self, rounds: int):
        self.role.send_weights(self.roles.rollout, version=rounds).result()
        begun = self.role.token_logprobs("start_logprobs", temperature=1.0) if self.config.knows_start else None
        return evaluate(
            self.data.held_out,
            policy=self.role.token_logprobs("logprobs", temperature=1.0),
            reference=begun,
            reward=self.roles.reward,
            rollout=self.roles.rollout,
            version=rounds,
        )

    def train(self, **_: Any) -> bool:
        encoder = Encoder(
            tokenizer=self.tokenizer, eos_ids=None, max_tokens=self.config.max_tokens, system_prompt=None
        )
        return train_in_rounds(
            self.config,
            self.data.train,
            policy=self.role,
            reward=self.roles.reward,
            rollout=self.roles.rollout,
            judge=self.judge,
            encode=lambda rows: encode_pairs(rows, encoder),
            columns=(),
            evaluate=self.held_out,
            run=self.run,
            state=self.state,
            done=open_rounds(self.config, self.run.directory, step=self.state.step),
        )

    def resume(self) -> None:
        found, _ = self.run.store.latest_valid()
        if found is None:
            self.run.directory.truncate_after(-1)
        else:
            self.state = IterativeState(**self.run.restore(found, {self.part: self.role}))

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.actors["policy"].model.named_parameters()}

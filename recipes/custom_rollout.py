"""Rollouts and rewards from a script of one's own, no trainer: `python recipes/custom_rollout.py`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from actors import ActorGroup, RewardModelActor, RolloutActor
from actors.launch import session
from alignment.config import ModelConfig, RewardConfig, RewardFunctionConfig, RolloutConfig
from alignment.data.chat import load_tokenizer
from alignment.data.model_assets import resolve_model
from alignment.data.prompts import make_prompt
from alignment.types import Rollout, Score

QUESTIONS = ["How is high blood pressure treated?", "What helps against hay fever?"]


def answer(path: str, *, rule: str = "text:finished_sentence") -> list[tuple[Rollout, Score]]:
    """Two scored answers to each question, from the model in `path`."""
    rules = RewardConfig(functions=(RewardFunctionConfig(name=rule),))
    sampler = RolloutActor(model_path=path, model=ModelConfig(), rollout=RolloutConfig(max_new_tokens=48), seed=1)
    tokenizer = load_tokenizer(path)
    prompts = [make_prompt(tokenizer, [{"role": "user", "content": question}]) for question in QUESTIONS]
    group = ActorGroup({"rollout": sampler, "reward_model": RewardModelActor(model=ModelConfig(), reward=rules)})
    try:
        group.start().result()
        rollouts = group.scatter("rollout", "generate", prompts, step=0, num_samples=2).result()
        return list(zip(rollouts, group.scatter("reward_model", "score", rollouts).result(), strict=True))
    finally:
        group.stop()


def line(rollout: Rollout, score: Score) -> str:
    total = "unscored" if score.total is None else f"{score.total:+.2f}"
    return f"{total:>8}  {rollout.prompt.messages[-1]['content']}  {rollout.response!r}"


if __name__ == "__main__":
    with session():
        print(*(line(*pair) for pair in answer(resolve_model(ModelConfig().path))), sep="\n")

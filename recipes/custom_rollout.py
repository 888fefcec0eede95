"""Rollouts and rewards from a script of one's own, no trainer: `python recipes/custom_rollout.py`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from actors import ActorGroup, RewardModelActor, RolloutActor
from actors.launch import connect
from alignment.config import ModelConfig, RewardConfig, RewardFunctionConfig, RolloutConfig
from alignment.data.chat import load_tokenizer
from alignment.data.model_assets import resolve_model
from alignment.data.prompts import make_prompt

QUESTIONS = ["How is high blood pressure treated?", "What helps against hay fever?"]


def main() -> None:
    connect()
    model, path = ModelConfig(), resolve_model(ModelConfig().path)
    sampler = RolloutActor(model_path=path, model=model, rollout=RolloutConfig(max_new_tokens=48), seed=1)
    rules = RewardConfig(functions=(RewardFunctionConfig(name="text:finished_sentence"),))
    group = ActorGroup({"rollout": sampler, "reward_model": RewardModelActor(model=model, reward=rules)})
    group.start().result()

    tokenizer = load_tokenizer(path)
    prompts = [make_prompt(tokenizer, [{"role": "user", "content": question}]) for question in QUESTIONS]
    rollouts = group.scatter("rollout", "generate", prompts, step=0, num_samples=2).result()
    scores = group.scatter("reward_model", "score", rollouts).result()
    for rollout, score in zip(rollouts, scores, strict=True):
        print(f"{score.total:+.2f}  {rollout.prompt.messages[-1]['content']}  {rollout.response!r}")
    group.stop()


if __name__ == "__main__":
    main()

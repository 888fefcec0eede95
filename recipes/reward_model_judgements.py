"""Train a reward model on what people say of answers: `python recipes/reward_model_judgements.py`.

By default whether an answer refuses (labels). Of the same shape, each with `--config recipes/configs/...`:
reward_model_harm.yaml, how harmful it is (ratings of up to three people); reward_model_nq_pairs.yaml and
reward_model_nq_rankings.yaml, which answer to a factual question is right. docs/reward_models.md has the columns that
rows of one's own need.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alignment.config import RewardModelRunConfig
from recipes import common
from recipes.reward_modelling import run_reward_model


def main(argv: list[str] | None = None) -> int:
    return common.run_recipe("reward_model_judgements", RewardModelRunConfig, run_reward_model, argv)


if __name__ == "__main__":
    sys.exit(main())

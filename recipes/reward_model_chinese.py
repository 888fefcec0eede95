"""Train a reward model on good and bad Chinese reviews: `python recipes/reward_model_chinese.py`.

A review is an answer that people labelled good or bad: logistic regression on its score.
`--config recipes/configs/reward_model_chinese_pairs.yaml` trains on pairs of Chinese answers instead. In most of them
the preferred one is the longer one: the report says what length alone would get right.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alignment.config import RewardModelRunConfig
from recipes import common
from recipes.reward_modelling import run_reward_model


def main(argv: list[str] | None = None) -> int:
    return common.run_recipe("reward_model_chinese", RewardModelRunConfig, run_reward_model, argv)


if __name__ == "__main__":
    sys.exit(main())

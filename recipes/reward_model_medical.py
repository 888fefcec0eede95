"""Train a Bradley-Terry reward model on real medical answers: `python recipes/reward_model_medical.py`.

The preferred answer of a pair is a clinician's treatment plan for the diagnosis asked about. The result,
`OUTPUT_DIR/final`, is an ordinary sequence-classification folder; `recipes/ppo_medical.py` hosts it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alignment.config import RewardModelRunConfig
from recipes import common
from recipes.reward_modelling import run_reward_model


def main(argv: list[str] | None = None) -> int:
    return common.run_recipe("reward_model_medical", RewardModelRunConfig, run_reward_model, argv)


if __name__ == "__main__":
    sys.exit(main())

"""PPO on medical calculators with a reward that can be verified: `python recipes/ppo_calculators.py`.

The policy begins where `recipes/sft_calculators.py` ends (run first when its result is not there yet) and works out
questions with other numbers. The reward is 1 for a final number within 5 %, else partial credit for steps worked out;
no reward model is asked. `--run.seed` draws another order and other samples from the same start.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alignment.config import PpoRunConfig
from recipes import common
from recipes.reinforcement import run_ppo


def main(argv: list[str] | None = None) -> int:
    return common.run_recipe("ppo_calculators", PpoRunConfig, run_ppo, argv)


if __name__ == "__main__":
    sys.exit(main())

"""PPO on a medical assistant, four models and a sampler as Ray actors: `python recipes/ppo_medical.py`.

Consumer health questions in, better answers out: the policy learns from a reward model (trained first by
`recipes/reward_model_medical.py` when it is not there yet) and from rule rewards, tied to the reference by a KL
penalty. `--local` runs the same in one process.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alignment.config import PpoRunConfig
from recipes import common
from recipes.reinforcement import run_ppo


def main(argv: list[str] | None = None) -> int:
    return common.run_recipe("ppo_medical", PpoRunConfig, run_ppo, argv)


if __name__ == "__main__":
    sys.exit(main())

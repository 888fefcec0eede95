"""A policy's own answers, ranked by rewards: `python recipes/rank_answers.py`.

The policy answers each prompt several times, the answers are scored, and `OUTPUT_DIR/final` gets pairs and labels for
DPO and KTO. By default it is `recipes/sft_calculators.py`'s (run first when it is not there yet) and a verifiable rule
scores it. `--reward.model` and other functions score as in PPO.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alignment.config import RankRunConfig
from recipes import common
from recipes.ranking import run_ranking


def main(argv: list[str] | None = None) -> int:
    return common.run_recipe("rank_answers", RankRunConfig, run_ranking, argv)


if __name__ == "__main__":
    sys.exit(main())

"""The recommender that learning from live choices begins with: `python recipes/dpo_recommender_early.py`.

`dpo_recommender.py` on what was known before the people of `live_recommender.py` choose.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alignment.config import RecommenderRunConfig
from recipes import common
from recipes.dpo_recommender import run_recommender


def main(argv: list[str] | None = None) -> int:
    return common.run_recipe("dpo_recommender_early", RecommenderRunConfig, run_recommender, argv)


if __name__ == "__main__":
    sys.exit(main())

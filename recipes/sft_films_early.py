"""Where the recommender of live choices begins to learn: `python recipes/sft_films_early.py`.

`sft_films.py` on what was known before the people of `live_recommender.py` choose; `dpo_recommender_early.py` goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alignment.config import SftRunConfig
from recipes import common
from recipes.supervised import run_sft


def main(argv: list[str] | None = None) -> int:
    return common.run_recipe("sft_films_early", SftRunConfig, run_sft, argv)


if __name__ == "__main__":
    sys.exit(main())

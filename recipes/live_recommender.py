"""A recommender that learns from choices while they arrive: `python recipes/live_recommender.py`.

It begins with what `dpo_recommender_early.py` leaves, trained first where it is not there. Choices come from people
of MovieLens who are replayed, by HTTP (`--live.port 8080`) or from a file that grows (`--live.file choices.jsonl`).
Each is on the disk before it is learnt, and learnt once, whatever is killed.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alignment.config import LiveRunConfig
from recipes import common
from recipes.live_learning import run_live


def main(argv: list[str] | None = None) -> int:
    return common.run_recipe("live_recommender", LiveRunConfig, run_live, argv)


if __name__ == "__main__":
    sys.exit(main())

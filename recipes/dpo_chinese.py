"""DPO on pairs of Chinese answers: `python recipes/dpo_chinese.py`.

Rows 240 to 299 of the data set are for the table alone. Those whose prompt leaves no room are left out, and long
answers are cut: the lines at the start say how many.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alignment.config import DpoRunConfig
from recipes import common
from recipes.preference_tuning import run_dpo


def main(argv: list[str] | None = None) -> int:
    return common.run_recipe("dpo_chinese", DpoRunConfig, run_dpo, argv)


if __name__ == "__main__":
    sys.exit(main())

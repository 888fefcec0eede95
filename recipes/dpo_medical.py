"""DPO on a policy's own answers to medical calculations: `python recipes/dpo_medical.py`.

A rule that can be verified has ranked the answers; of each pair the chosen one is right, or closer to it. The table
has the share of held-out questions that are answered right before and after.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alignment.config import DpoRunConfig
from recipes import common
from recipes.preference_tuning import run_dpo


def main(argv: list[str] | None = None) -> int:
    return common.run_recipe("dpo_medical", DpoRunConfig, run_dpo, argv)


if __name__ == "__main__":
    sys.exit(main())

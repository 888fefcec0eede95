"""KTO on a policy's own answers to medical calculations: `python recipes/kto_medical.py`.

A rule that can be verified has labelled each answer right or wrong; nobody compares two. The table has the share of
held-out questions that are answered right before and after.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alignment.config import KtoRunConfig
from recipes import common
from recipes.preference_tuning import run_kto


def main(argv: list[str] | None = None) -> int:
    return common.run_recipe("kto_medical", KtoRunConfig, run_kto, argv)


if __name__ == "__main__":
    sys.exit(main())

"""Fine-tuning on worked medical calculators: `python recipes/sft_calculators.py`.

Questions of six calculators, in English and Chinese, answered in equations. `OUTPUT_DIR/final` is where
`recipes/ppo_calculators.py` begins.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alignment.config import SftRunConfig
from recipes import common
from recipes.supervised import run_sft


def main(argv: list[str] | None = None) -> int:
    return common.run_recipe("sft_calculators", SftRunConfig, run_sft, argv)


if __name__ == "__main__":
    sys.exit(main())

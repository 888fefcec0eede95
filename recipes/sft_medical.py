"""Full fine-tuning on clinicians' treatment plans: `python recipes/sft_medical.py`.

Every parameter learns to answer "How is ... treated?" as the notes of real patients do; diseases that are held out
appear in no training example. `OUTPUT_DIR/final` is an ordinary Hugging Face folder: the next stage takes it by
`--model.path`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alignment.config import SftRunConfig
from recipes import common
from recipes.supervised import run_sft


def main(argv: list[str] | None = None) -> int:
    return common.run_recipe("sft_medical", SftRunConfig, run_sft, argv)


if __name__ == "__main__":
    sys.exit(main())

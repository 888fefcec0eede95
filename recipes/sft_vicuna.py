"""Multi-turn conversations in ShareGPT's form, every answer trained: `python recipes/sft_vicuna.py`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alignment.config import SftRunConfig
from recipes import common
from recipes.supervised import run_sft


def main(argv: list[str] | None = None) -> int:
    return common.run_recipe("sft_vicuna", SftRunConfig, run_sft, argv)


if __name__ == "__main__":
    sys.exit(main())

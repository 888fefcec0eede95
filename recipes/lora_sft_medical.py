"""The data of `recipes/sft_medical.py`, learnt by a LoRA adapter (Hu 2021): `python recipes/lora_sft_medical.py`.

`OUTPUT_DIR/final` has the adapter merged into the weights, `OUTPUT_DIR/final/adapter` the adapter alone, which plain
peft loads on the base model. `--training.adapter.type` takes any other method of docs/peft.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alignment.config import SftRunConfig
from recipes import common
from recipes.supervised import run_sft


def main(argv: list[str] | None = None) -> int:
    return common.run_recipe("lora_sft_medical", SftRunConfig, run_sft, argv)


if __name__ == "__main__":
    sys.exit(main())

"""QLoRA (Dettmers 2023) of a model of the Llama family: `python recipes/qlora_llama.py`.

The base model's matrices are held in four bits with double quantization, an adapter learns on top of them. The same
file fine-tunes any Llama: `--model.path /models/Llama-3.2-3B-Instruct`, on a GPU with `--model.dtype bfloat16`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alignment.config import SftRunConfig
from recipes import common
from recipes.supervised import run_sft


def main(argv: list[str] | None = None) -> int:
    return common.run_recipe("qlora_llama", SftRunConfig, run_sft, argv)


if __name__ == "__main__":
    sys.exit(main())

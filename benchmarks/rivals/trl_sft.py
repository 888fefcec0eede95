"""Seconds, losses and memory of TRL's SFTTrainer on given rows, in their order, one batch after the other.

    python benchmarks/rivals/trl_sft.py --model MODEL_FOLDER --rows rows.jsonl --batch-size 8 --json trl.json

Each line of the file has `input_ids` and `labels` (-100 where nothing is learnt).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.rivals.trl_steps import parser_of, run, trainer_in_order


def build_trainer(args: argparse.Namespace, rows: list[dict[str, Any]], folder: str, clock: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    prepared = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    return trainer_in_order(SFTTrainer, SFTConfig, args, rows, folder, clock, **prepared)


if __name__ == "__main__":
    run(parser_of(__doc__).parse_args(), build_trainer)

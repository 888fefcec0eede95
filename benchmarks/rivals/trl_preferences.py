"""Seconds, losses and memory of TRL's DPOTrainer or KTOTrainer on given rows, in their order, batch after batch.

    python benchmarks/rivals/trl_preferences.py --kind dpo --model MODEL_FOLDER --rows rows.jsonl --batch-size 4 \\
        --json trl.json

Each line of the file has `prompt_ids`, `chosen_ids`, `rejected_ids`, or `prompt_ids`, `completion_ids`, `label` and
`KL_completion_ids`, the answer that the prompt meets for the baseline. Beyond what every rival here changes, the rows
are ids already.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.rivals.trl_steps import parser_of, run, trainer_in_order


def build_trainer(args: argparse.Namespace, rows: list[dict[str, Any]], folder: str, clock: Any) -> Any:
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    trainer, config = (DPOTrainer, DPOConfig) if args.kind == "dpo" else (KTOTrainer, KTOConfig)

    class Prepared(trainer):
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    cached = args.reference == "cached"
    return trainer_in_order(Prepared, config, args, rows, folder, clock, beta=0.1, precompute_ref_log_probs=cached)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--kind", choices=("dpo", "kto"), required=True)
    parser.add_argument("--reference", choices=("cached", "live"), default="live", help="cached: precomputed")
    run(parser.parse_args(), build_trainer)


if __name__ == "__main__":
    main()

"""Seconds, losses and memory of TRL's DPOTrainer or KTOTrainer on given rows, in their order, batch after batch.

    python benchmarks/rivals/trl_preferences.py --kind dpo --model MODEL_FOLDER --rows rows.jsonl --json trl.json

Each line of the file has `prompt_ids`, `chosen_ids`, `rejected_ids`, or `prompt_ids`, `completion_ids`, `label` and
`KL_completion_ids`, the answer that the prompt meets for the baseline. Full fine-tuning in fp32 with AdamW. Nothing of
TRL is changed, except that rows are ids already and come in the file's order, and that gradient checkpointing, which
its config switches on, is off unless asked for: it costs time.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.rivals.trl_install import trl_folder
from benchmarks.rivals.trl_sft import TRL_VERSION, build_clock


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("dpo", "kto"), required=True)
    parser.add_argument("--model", required=True, help="folder of the causal language model")
    parser.add_argument("--rows", type=Path, required=True, help="JSONL with ids")
    parser.add_argument("--trl-path", type=Path, help=f"folder that holds trl {TRL_VERSION}; default: install it once")
    parser.add_argument("--batch-size", type=int, required=True, help="rows a step, in one forward")
    parser.add_argument("--reference", choices=("cached", "live"), default="live", help="cached: precomputed")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    return parser.parse_args()


def build_trainer(args: argparse.Namespace, rows: list[dict[str, Any]], output_dir: str, clock: Any) -> Any:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    trainer, config = (DPOTrainer, DPOConfig) if args.kind == "dpo" else (KTOTrainer, KTOConfig)

    class InOrder(trainer):
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset if dataset is None else dataset)

    settings = config(
        output_dir=output_dir,
        max_steps=len(rows) // args.batch_size,
        per_device_train_batch_size=args.batch_size,
        precompute_ref_log_probs=args.reference == "cached",
        gradient_checkpointing=args.gradient_checkpointing,
        beta=0.1,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        warmup_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    return InOrder(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        args=settings,
        processing_class=AutoTokenizer.from_pretrained(args.model),
        train_dataset=Dataset.from_list(rows),
        callbacks=[clock],
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from alignment.memory import MemoryMeter

    torch.set_num_threads(args.threads)
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()]
    clock = build_clock()
    with MemoryMeter(count_dev_shm=False) as meter, tempfile.TemporaryDirectory() as folder:
        build_trainer(args, rows, folder, clock).train()
    packages = ("torch", "transformers", "accelerate")
    return {
        "system": f"trl {TRL_VERSION}, {args.reference}"
        + (", gradient checkpointing" if args.gradient_checkpointing else ""),
        "reference": args.reference,
        "seconds": clock.seconds,
        "losses": clock.losses,
        "peak_mb": round(meter.peak_mb),
        "versions": {"trl": TRL_VERSION} | {name: importlib.metadata.version(name) for name in packages},
    }


def main() -> None:
    args = parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before torch is imported
    sys.path.insert(1, str(trl_folder(TRL_VERSION, args.trl_path)))
    args.json.write_text(json.dumps(measure(args), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

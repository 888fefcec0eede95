"""What the rivals on given rows share: their options, their rows in the file's order, a clock, and the result as JSON.

Full fine-tuning in fp32 with AdamW at a constant rate. Nothing of TRL is changed, except that rows come in the file's
order and that gradient checkpointing, which its config switches on, is off unless asked for: it costs time.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.rivals.trl_install import trl_folder

TRL_VERSION = "1.16.0"
BuildTrainer = Callable[[argparse.Namespace, list[dict[str, Any]], str, Any], Any]
"""From the options, the rows, a folder to write to and the clock to a trainer of TRL."""


def parser_of(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the causal language model")
    parser.add_argument("--rows", type=Path, required=True, help="JSONL with ids")
    parser.add_argument("--trl-path", type=Path, help=f"folder that holds trl {TRL_VERSION}; default: install it once")
    parser.add_argument("--batch-size", type=int, required=True, help="rows a step, in one forward")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    return parser


def trainer_in_order(
    trainer: type,
    config: type,
    args: argparse.Namespace,
    rows: list[dict[str, Any]],
    folder: str,
    clock: Any,
    **own: Any,
) -> Any:
    """A trainer of TRL's class `trainer` that reads `rows` in their order; `own` are settings of its `config`."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    class InOrder(trainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset if dataset is None else dataset)

    settings = config(
        output_dir=folder,
        max_steps=len(rows) // args.batch_size,
        per_device_train_batch_size=args.batch_size,
        gradient_checkpointing=args.gradient_checkpointing,
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
        **own,
    )
    return InOrder(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        args=settings,
        processing_class=AutoTokenizer.from_pretrained(args.model),
        train_dataset=Dataset.from_list(rows),
        callbacks=[clock],
    )


def clock_class() -> Any:
    """Of callbacks that keep seconds and loss of each step."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.losses: list[float] = []
            self.last = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.last = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now = time.perf_counter()
            self.seconds.append(now - self.last)
            self.last = now

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if "loss" in kwargs["logs"]:
                self.losses.append(float(kwargs["logs"]["loss"]))

    return Clock


def measure(args: argparse.Namespace, build_trainer: BuildTrainer) -> dict[str, Any]:
    import torch

    from alignment.memory import MemoryMeter

    torch.set_num_threads(args.threads)
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()]
    clock = clock_class()()
    with MemoryMeter(count_dev_shm=False) as meter, tempfile.TemporaryDirectory() as folder:
        build_trainer(args, rows, folder, clock).train()
    packages = ("torch", "transformers", "accelerate")
    return {
        "system": f"trl {TRL_VERSION}" + (", gradient checkpointing" if args.gradient_checkpointing else ""),
        "seconds": clock.seconds,
        "losses": clock.losses,
        "peak_mb": round(meter.peak_mb),
        "versions": {"trl": TRL_VERSION} | {name: importlib.metadata.version(name) for name in packages},
    }


def run(args: argparse.Namespace, build_trainer: BuildTrainer) -> None:
    """The body of a rival: train and write the figures."""
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before torch is imported
    sys.path.insert(1, str(trl_folder(TRL_VERSION, args.trl_path)))
    args.json.write_text(json.dumps(measure(args, build_trainer), indent=2) + "\n", encoding="utf-8")

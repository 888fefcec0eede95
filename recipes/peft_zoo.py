"""Every method of fine-tuning on one task, in one table: `python recipes/peft_zoo.py`.

Each method of the config's `zoo` is a run of its own in `OUTPUT_DIR/NAME`, on the same examples in the same order; one
that is finished is not run again. The table, `OUTPUT_DIR/zoo.md`, has the share of parameters that each trains, peak
memory of all processes, tokens per second of training, and the held-out loss before and after; below it, where AdaLoRA
has put its ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from actors.launch import session
from alignment.config.zoo import PeftZooConfig
from alignment.memory import MemoryMeter
from recipes import checks, common
from recipes.supervised import check, run_sft

HEAD = (
    f"| {'method':<14} | trained, % | peak MB | tokens/s | loss before | loss after | gain, 95 % interval |",
    "|---|---|---|---|---|---|---|",
)


def run_zoo(job: common.Job[PeftZooConfig]) -> None:
    """One method after the other. All are checked before the first one starts."""
    jobs = {name: job_of(job, name) for name in job.config.zoo}
    for name, one in jobs.items():
        try:
            check(one)
            # Of a method that is finished too: its figures must be those of this config.
            checks.check_start(one)
        except ValueError as error:
            raise ValueError(f"zoo.{name}: {error}") from error
    if job.dry_run:
        for one in jobs.values():
            run_sft(one)
        return
    with contextlib.nullcontext() if job.local else session():
        job.started = job.is_of_runs = True
        for name, one in jobs.items():
            if not (one.output_dir / "summary.json").exists():
                print(f"== {name}", flush=True)
                one.began = time.monotonic()
                with one.memory:
                    run_sft(one)
    folders = {name: one.output_dir for name, one in jobs.items()}
    text = "\n".join([*HEAD, *(row(name, folder) for name, folder in folders.items()), *ranks(folders)])
    (job.output_dir / "zoo.md").write_text(text + "\n", encoding="utf-8")
    print(text, flush=True)


def job_of(job: common.Job[PeftZooConfig], name: str) -> common.Job[Any]:
    """The run of one method."""
    own: Any = {"config": job.config.of(name), "output_dir": job.output_dir / name}
    return dataclasses.replace(job, **own, memory=MemoryMeter(interval=0.5))


def row(name: str, folder: Path) -> str:
    """A finished run's line of the table."""
    summary = json.loads((folder / "summary.json").read_text())
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rate = sum(step["sft/tokens"] for step in steps) / sum(step["timing/update"] for step in steps)
    loss, parameters = summary["held_out"]["loss"], summary["parameters"]
    low, high = loss["gain_ci95"]
    return (
        f"| {name:<14} | {100 * parameters['trained'] / parameters['all']:.3f} | {summary['peak_memory_mb']} "
        f"| {rate:.0f} | {loss['before']:.4f} | {loss['after']:.4f} | {low:+.4f} .. {high:+.4f} |"
    )


def ranks(folders: Mapping[str, Path]) -> list[str]:
    """How the methods that move rank between matrices have shared it out at the end."""
    lines = []
    for name, folder in folders.items():
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        by_matrix = [int(value) for key, value in last.items() if key.startswith("adalora/rank/")]
        if by_matrix:
            shares = ", ".join(f"{by_matrix.count(rank)} of rank {rank}" for rank in sorted(set(by_matrix)))
            lines.append(f"\n{name}: total rank {sum(by_matrix)} over {len(by_matrix)} matrices: {shares}")
    return lines


def main(argv: list[str] | None = None) -> int:
    return common.run_recipe("peft_zoo", PeftZooConfig, run_zoo, argv)


if __name__ == "__main__":
    sys.exit(main())

"""DPO steps on two cores, next to a rival's on the same pairs in the same run: `python benchmarks/dpo_step.py`.

The work: full fp32 fine-tuning of SmolLM2-135M on real pairs of answers, batch 4, mean length of a pair's two
sequences drawn from a lognormal distribution (median 55, at most 220 tokens), AdamW with a constant rate; once with
the reference's numbers made before the run, once with a frozen copy that is asked at every step. Both systems see the
same ids in the same order, and their losses are compared step by step. Prints seconds a step, peak memory of all
processes, and both ratios.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from alignment.config import DpoRunConfig
from alignment.data.tasks import load_pair_tasks
from alignment.types import PreferencePair
from benchmarks.preference_steps import LONGEST, Values, Work, layouts_of, run


def rows_of(values: Values, pair: PreferencePair) -> Iterator[tuple[Values, float]]:
    lengths = [len(ids) for ids in pair.sequences]
    if max(lengths) <= LONGEST:
        yield values, sum(lengths) / 2


def rival_rows(batch: Sequence[PreferencePair]) -> Iterator[Values]:
    for pair in batch:
        yield {"prompt_ids": pair.prompt_ids, "chosen_ids": pair.chosen_ids, "rejected_ids": pair.rejected_ids}


def read(config: Any, tokenizer: Any, eos_ids: frozenset[int] | None) -> Any:
    return load_pair_tasks(config.data, tokenizer, eos_ids=eos_ids, seed=config.run.seed)


WORK = Work(
    kind="dpo",
    batch=4,
    micro_batch="max_tokens_per_micro_batch: 442",  # the longest pair
    config=DpoRunConfig,
    read=read,
    rows_of=rows_of,
    rival_rows=rival_rows,
    layouts=layouts_of("dpo"),
)

if __name__ == "__main__":
    run(WORK, __doc__)

"""KTO steps on two cores, next to a rival's on the same labels in the same run: `python benchmarks/kto_step.py`.

The work: full fp32 fine-tuning of SmolLM2-135M on real answers, each labelled good or bad, batch 8, lengths of prompt
and answer drawn from a lognormal distribution (median 55, at most 220 tokens), AdamW with a constant rate; once with
the reference's numbers made before the run, once with a frozen copy that is asked at every step. Both systems see the
same ids in the same order and pair the same prompts and answers for the baseline; their losses are compared step by
step. Prints seconds a step, peak memory of all processes, and both ratios.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from alignment.config import KtoRunConfig
from alignment.data.formats import read_messages
from alignment.data.tasks import load_label_tasks
from alignment.judgements import LabelledAnswer
from alignment.learners.kto import mismatched
from alignment.types import PreferencePair
from benchmarks.preference_steps import LONGEST, Values, Work, layouts_of, run


def rows_of(values: Values, pair: PreferencePair) -> Iterator[tuple[Values, float]]:
    """One of a pair's answers, so that no prompt comes twice."""
    side = ("chosen", "rejected")[len(pair.prompt_ids) % 2]
    length = len(pair.sequences[side == "rejected"])
    answer = values[side] if isinstance(values[side], str) else read_messages([values[side]])[0]["content"]
    asked = read_messages(values["conversations"]) if "conversations" in values else values["prompt"]
    if values.get("system"):
        asked = [{"role": "system", "content": values["system"]}, *asked]
    if length <= LONGEST:
        yield {"prompt": asked, "completion": answer, "label": side == "chosen"}, float(length)


def rival_rows(batch: Sequence[LabelledAnswer]) -> Iterator[Values]:
    for record, other in zip(batch, mismatched(batch), strict=True):
        yield {
            "prompt_ids": record.prompt_ids,
            "completion_ids": record.answer_ids,
            "KL_completion_ids": other.answer_ids,
            "label": record.target == 1,
        }


def read(config: Any, tokenizer: Any, eos_ids: frozenset[int] | None) -> Any:
    return load_label_tasks(config.data, tokenizer, eos_ids=eos_ids, seed=config.run.seed)


WORK = Work(
    kind="kto",
    batch=8,
    micro_batch="max_tokens_per_micro_batch: 320",
    config=KtoRunConfig,
    read=read,
    rows_of=rows_of,
    rival_rows=rival_rows,
    layouts=layouts_of("kto"),
)

if __name__ == "__main__":
    run(WORK, __doc__)

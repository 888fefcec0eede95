"""Chinese and English instructions, and a table of Chinese medicine: `python recipes/sft_alpaca.py`.

Three sources in one mixture: Alpaca instructions in both languages, and questions about diseases, their symptoms and
the department that treats them. Diseases that are held out appear in no training example, in no wording: the quiz asks
for their departments, before and after.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alignment.config import SftRunConfig
from alignment.data.diseases import held_out_questions, majority_floor
from alignment.loops.quiz import Quiz
from recipes import common
from recipes.supervised import questions_for, run_sft


def ask(tokenizer: Any, system_prompt: str | None) -> Quiz:
    """The department of every held-out disease, from its name and its symptoms."""
    rows = [row for row in held_out_questions() if row.kind == "department"]
    return questions_for(tokenizer, system_prompt, rows, name="department", majority_floor=majority_floor(rows))


def main(argv: list[str] | None = None) -> int:
    return common.run_recipe("sft_alpaca", SftRunConfig, lambda job: run_sft(job, ask), argv)


if __name__ == "__main__":
    sys.exit(main())

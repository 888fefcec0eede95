"""DPO on a policy's own answers, in rounds: `python recipes/iterative_dpo.py`.

In each round the policy answers prompts several times, rewards rank its answers, and it learns from the pairs, with
some of earlier rounds; then it answers anew. By default it is `recipes/sft_calculators.py`'s (run first when it is not
there yet) and a verifiable rule scores it. `--rounds.label_by person` asks somebody instead; see docs/iterative.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alignment.config import IterativeRunConfig
from recipes import common
from recipes.iteration import run_iterative


def main(argv: list[str] | None = None) -> int:
    return common.run_recipe("iterative_dpo", IterativeRunConfig, run_iterative, argv)


if __name__ == "__main__":
    sys.exit(main())

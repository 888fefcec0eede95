"""Fine-tuning on what people liked, one film after the other: `python recipes/sft_films.py`.

"I liked these films: ... Which film should I watch next?", answered by the twenty that a person liked next.
`OUTPUT_DIR/final` is where `recipes/dpo_recommender.py` begins.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alignment.config import SftRunConfig
from recipes import common
from recipes.supervised import run_sft


def main(argv: list[str] | None = None) -> int:
    return common.run_recipe("sft_films", SftRunConfig, run_sft, argv)


if __name__ == "__main__":
    sys.exit(main())

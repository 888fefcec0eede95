"""The card of a finished model, or of data that a model made: what it came from, what it read, what it reached."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignment.run_directory import write_text_atomic


def write_model_card(
    folder: Path,
    *,
    recipe: str,
    base: str,
    config: str,
    data: str,
    inputs: Mapping[str, str],
    figures: Mapping[str, Any],
    step: int,
    chosen: bool = False,
) -> None:
    """Write `README.md` in the form that model hubs read: YAML facts, then prose and tables.

    Args:
        base: the model that was trained, as the config names it.
        config: the resolved config, YAML.
        data: one line of counts, no text of the data.
        inputs: sha256 of what was read, by name.
        figures: rows of held-out figures, see `recipes.common.write_summary`.
        step: the optimiser step whose weights these are.
        chosen: whether the held-out loss chose that step among others.
    """
    table = [
        f"| {name} | {row['before']:.4f} | {row['after']:.4f} "
        f"| {row['gain_ci95'][0]:+.4f} .. {row['gain_ci95'][1]:+.4f} "
        f"| {row['n']} | {'higher' if row['higher_is_better'] else 'lower'} |"
        for name, row in figures.items()
    ]
    adapter = "\n`adapter/` holds the adapter alone.\n" if (folder / "adapter").is_dir() else ""
    if not (folder / "config.json").is_file():
        adapter = "\nThe adapter cannot be merged: load the base model, and `adapter/` on it.\n"
    bias = "\nThe held-out loss has also chosen the step, so its gain is a little too good.\n" if chosen else ""
    text = f"""---
library_name: transformers
base_model: {json.dumps(base)}
tags: [raylign, {recipe}]
---

# {recipe}

Fine-tuned from `{base}` by Raylign's `recipes/{recipe}.py`; weights of optimiser step {step}.
{adapter}
## Held-out figures

| | before | after | gain, 95 % interval | items | better |
|---|---|---|---|---|---|
{chr(10).join(table)}
{bias}
## Data

{data}

{chr(10).join(f"- sha256 of {name}: `{value}`" for name, value in inputs.items())}

## Config

```yaml
{config.strip()}
```
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def write_data_card(
    folder: Path, *, recipe: str, model: str, config: str, prompts: str, inputs: Mapping[str, str], figures: str
) -> None:
    """Write `README.md` beside the rows that a ranking run leaves.

    Args:
        model: whose answers they are, as the config names it.
        config: the resolved config, YAML.
        prompts: one line of counts, no text of the data.
        inputs: sha256 of what was read, by name.
        figures: lines of a table.
    """
    read = "\n".join(f"- {name}: `{digest}`" for name, digest in inputs.items())
    text = f"""# {recipe}

Answers of `{model}` to prompts, scored by Raylign's `recipes/{recipe}.py`. `answers.jsonl` has every answer with a
score, `pairs.jsonl` and `labels.jsonl` the preferences that the scores give. Held-out prompts stand in none of them.

## Figures

```
{figures}
```

## Inputs

Prompts: {prompts}.

{read}

## Config

```yaml
{config.strip()}
```
"""
    write_text_atomic(folder / "README.md", text)

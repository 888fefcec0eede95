"""A small table of who liked which film when, and recommender runs of tiny models on it."""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

from alignment.config import FilmsConfig
from alignment.data.movielens import MovieLens, read_movielens
from alignment.data.movielens_pairs import pair_rows

NUM_TEST = 90
FILMS = f"folder: {{folder}}, num_test: {NUM_TEST}, num_negatives: 14, choices_per_person: 1, row_tokens: 700"
COMMON = """
run: {{num_steps: {steps}, checkpoint_every: 1, trackers: []}}
data: {{{data}max_tokens: 200}}
model: {{path: {model}}}
dpo: {{terms: [{{kind: sigmoid}}, {{kind: sft, weight: 0.2}}], beta: 0.2, share_prompts: true}}
films: {{{films}}}
"""
OFFLINE = """
reference: {mode: cached}
training: {batch_size: 4, micro_batch_size: 2, adapter: {r: 4}, optimizer: {lr: 2.0e-3}}
"""
LIVE = """
training:
  choices_per_step: 2
  pairs_per_choice: 2
  micro_batch_size: 2
  adapter: {{r: 4}}
  optimizer: {{lr: 2.0e-3, warmup_ratio: 0.0, decay: constant}}
base: {base}
live: {{replay: true, poll_seconds: 0.01}}
"""


def write_tables(folder: Path, *, people: int = 20, films: int = 40, ratings: int = 340) -> Path:
    """People of two tastes, each of whom likes films of one half and not of the other."""
    draw, seen = random.Random(3), set()
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    while len(seen) < ratings:
        user, film = draw.randint(1, people), draw.randint(1, films)
        if (user, film) not in seen:
            seen.add((user, film))
            stars = (5 if draw.random() < 0.9 else 3) if user % 2 == film % 2 else 2
            lines.append(f"{user}\t{film}\t{stars}\t{1000 + len(seen)}")
    (folder / "ml-100k.inter").write_text("\n".join(lines) + "\n")
    named = [f"{film}\t{'Odd' if film % 2 else 'Even'} {film}\t{1950 + film}\tDrama" for film in range(1, films + 1)]
    header = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"
    (folder / "ml-100k.item").write_text("\n".join([header, *named]) + "\n")
    return folder


def table_of(folder: Path) -> MovieLens:
    return read_movielens(folder / "ml-100k.inter", folder / "ml-100k.item", num_test=NUM_TEST)


def write_recommender(folder: Path, model: Path) -> Path:
    """Tables, pairs, `offline.yaml`, `early.yaml` and `live.yaml`, which begins with `FOLDER/early/final`."""
    tables = write_tables(folder / "tables")
    data = table_of(tables)
    for name, table in (("offline", data), ("early", data.without_test(NUM_TEST))):
        rows = [row.values for row in pair_rows(table, seed=0)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        films = FILMS.format(folder=tables) + (", early: true" if name == "early" else "")
        source = f"sources: [{{path: {folder}/{name}.jsonl, name: films}}], held_out: 6, "
        text = COMMON.format(steps=4, data=source, model=model, films=films) + OFFLINE
        (folder / f"{name}.yaml").write_text(text)
    films = FILMS.format(folder=tables) + ", early: true"
    text = COMMON.format(steps=1000, data="", model=folder / "early" / "final", films=films)
    (folder / "live.yaml").write_text(text + LIVE.format(base=model))
    return folder


def films_config(root: Path, **changes: object) -> FilmsConfig:
    return FilmsConfig.model_validate(
        {"folder": str(root / "tables"), "num_test": NUM_TEST, "num_negatives": 14, "choices_per_person": 1, **changes}
    )


def killed_run(point: str, step: str, recipe: str, flags: list[str]) -> int:
    """A recipe in this process, which kills itself after `step` updates: `learnt`, before anything of the step is on
    the disk, or `saved`, when all but the rename is."""
    from alignment.checkpoint import CheckpointStore
    from alignment.loops.run import Run

    owner, name = {"learnt": (Run, "finish_step"), "saved": (CheckpointStore, "commit")}[point]
    original, calls = getattr(owner, name), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == int(step):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, counted)
    return importlib.import_module(f"recipes.{recipe}").main(flags)


if __name__ == "__main__":
    sys.exit(killed_run(*sys.argv[1:4], sys.argv[4:]))

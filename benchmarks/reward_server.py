"""A reward server with batches against one request after the other: `python benchmarks/reward_server.py`.

The same responses are scored three ways by one server process: one request for each, one after the other; one request
for each, many at a time, which the server puts together; and as a client of a run sends them, many to a request.
Scores must agree. Seconds are the client's, the best of the repetitions.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rewards.remote import RemoteReward  # noqa: E402

WORDS = tuple("abdefghijklmnoprstuvw")  # as many tokens as words
Scores = list[float | None]


def texts(count: int, shortest: int, longest: int) -> tuple[list[str], list[str]]:
    """Questions and answers of evenly spread numbers of words."""
    draw = random.Random(0)
    lengths = [shortest + round(i * (longest - shortest) / max(count - 1, 1)) for i in range(count)]
    draw.shuffle(lengths)
    answers = [" ".join(draw.choices(WORDS, k=length)) for length in lengths]
    return [f"What about {' '.join(draw.choices(WORDS, k=8))}?" for _ in range(count)], answers


def random_reward_model(folder: Path, source: str) -> Path:
    """A model in the shape of a causal one, its score head drawn at random: as fast as a trained one."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from alignment.data.model_assets import resolve_model

    path = resolve_model(source)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(path, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(path).save_pretrained(folder)
    return folder


@contextlib.contextmanager
def server(model: Path, *arguments: str) -> Iterator[str]:
    """The URL of a reward server that has loaded `model`."""
    command = [sys.executable, "-m", "rewards.serve", str(model), "--port", "0", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line.startswith("listening on "):
            raise RuntimeError("got a server that did not start; what it printed stands above")
        yield line.removeprefix("listening on ").strip()
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


def ways(url: str, clients: int) -> dict[str, Callable[[list[str], list[str]], Scores]]:
    """From prompts and responses to scores, in three ways."""
    single = RemoteReward(url=f"{url}/score", batch_size=1, concurrency=1, timeout=600)

    def together(prompts: list[str], responses: list[str]) -> Scores:
        with ThreadPoolExecutor(clients) as pool:
            return [s for scores in pool.map(lambda p, r: single([p], [r]), prompts, responses) for s in scores]

    return {
        "one request after the other": single,
        f"{clients} clients, one response each": together,
        "batches of 32": RemoteReward(url=f"{url}/score", batch_size=32, concurrency=4, timeout=600),
    }


def measure(url: str, prompts: list[str], responses: list[str], clients: int, repetitions: int) -> list[dict]:
    """One row for each way: seconds of the best repetition, responses a second, speed against the first way."""
    seconds: dict[str, list[float]] = {}
    scores: dict[str, Scores] = {}
    for repetition in range(repetitions + 1):
        for name, way in ways(url, clients).items():
            began = time.perf_counter()
            scores[name] = way(prompts, responses)
            if repetition:  # the first of each warms up
                seconds.setdefault(name, []).append(time.perf_counter() - began)
    first = next(iter(seconds))
    return [
        {
            "way": name,
            "seconds": round(min(taken), 3),
            "responses_per_second": round(len(responses) / min(taken), 1),
            "speed": round(min(seconds[first]) / min(taken), 2),
            "largest_difference": max(
                abs((one or 0.0) - (other or 0.0)) for one, other in zip(scores[name], scores[first], strict=True)
            ),
        }
        for name, taken in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="asset:smollm2-135m-instruct", help="a causal model; gets a random head")
    parser.add_argument("--reward-model", type=Path, help="a reward model to take as it is instead")
    parser.add_argument("--count", type=int, default=64, help="responses")
    parser.add_argument("--shortest", type=int, default=5, help="words of a response")
    parser.add_argument("--longest", type=int, default=60)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    prompts, responses = texts(args.count, args.shortest, args.longest)
    with tempfile.TemporaryDirectory() as folder:
        model = args.reward_model or random_reward_model(Path(folder), args.model)
        with server(model, "--device", args.device, "--dtype", args.dtype) as url:
            print(f"{args.count} responses of {args.shortest} to {args.longest} words, {args.device}, {args.dtype}")
            for row in measure(url, prompts, responses, args.clients, args.repetitions):
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

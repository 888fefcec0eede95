"""A reward server with batches against one request after the other: `python benchmarks/reward_server.py`.

The same responses are scored three ways by one server process: one request for each, one after the other; one request
for each, many at a time, which the server puts together; and as a client of a run sends them, many to a request.
Scores must agree. The ways take turns; of each the best repetition counts.

Seconds are the client's. Processor seconds are the server's: on a busy machine they say more. Tokens are what the
server computed for a response; one by one that is the mean length of a conversation, template included.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rewards.remote import RemoteReward  # noqa: E402

WORDS = tuple("abdefghijklmnoprstuvw")  # as many tokens as words
Scores = list[float | None]
LENGTHS = [(1, 10, 5, 60), (1, 10, 2, 10), (8, 60, 10, 30)]
"""Answers to a question, words of a question, of the shortest and the longest answer."""


@dataclass(frozen=True)
class Workload:
    """What is to be scored. Lengths are in words."""

    name: str
    prompts: list[str]
    responses: list[str]


def workload(count: int, *, answers: int, question: int, shortest: int, longest: int) -> Workload:
    """`count` responses of evenly spread lengths, `answers` of them to each question."""
    draw = random.Random(0)
    lengths = [shortest + round(i * (longest - shortest) / max(count - 1, 1)) for i in range(count)]
    draw.shuffle(lengths)
    asked = [f"What about {' '.join(draw.choices(WORDS, k=question - 2))}?" for _ in range(0, count, answers)]
    name = f"questions of {question} words, {answers} answer(s) of {shortest} to {longest} words to each"
    responses = [" ".join(draw.choices(WORDS, k=length)) for length in lengths]
    return Workload(name, [asked[i // answers] for i in range(count)], responses)


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


@dataclass(frozen=True)
class Server:
    url: str
    pid: int

    def tokens(self) -> int:
        """Tokens computed since it began."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            (found,) = re.findall(r"^raylign_reward_tokens_total (\d+)$", answer.read().decode(), re.M)
        return int(found)

    def processor_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def server(model: Path, *arguments: str) -> Iterator[Server]:
    """A reward server that has loaded `model`."""
    command = [sys.executable, "-m", "rewards.serve", str(model), "--port", "0", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line.startswith("listening on "):
            raise RuntimeError("got a server that did not start; what it printed stands above")
        yield Server(line.removeprefix("listening on ").strip(), process.pid)
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


def measure(served: Server, work: Workload, clients: int, repetitions: int) -> list[dict[str, Any]]:
    """One row for each way: its best repetition, and its speed against the first way."""
    seconds: dict[str, list[float]] = {}
    processor: dict[str, list[float]] = {}
    tokens: dict[str, int] = {}
    scores: dict[str, Scores] = {}
    asked = ways(served.url, clients)
    next(iter(asked.values()))(work.prompts[:1], work.responses[:1])  # warms up
    for _ in range(repetitions):
        for name, way in asked.items():
            computed, used, began = served.tokens(), served.processor_seconds(), time.perf_counter()
            scores[name] = way(work.prompts, work.responses)
            seconds.setdefault(name, []).append(time.perf_counter() - began)
            processor.setdefault(name, []).append(served.processor_seconds() - used)
            tokens[name] = served.tokens() - computed
    first, count = next(iter(seconds)), len(work.responses)
    return [
        {
            "way": name,
            "tokens_per_response": round(tokens[name] / count, 1),
            "seconds": round(min(taken), 2),
            "processor_seconds": round(min(processor[name]), 2),
            "responses_per_second": round(count / min(taken), 2),
            "speed": round(min(seconds[first]) / min(taken), 2),
            "speed_by_processor_seconds": round(min(processor[first]) / min(processor[name]), 2),
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
    parser.add_argument(
        "--lengths",
        type=int,
        nargs=4,
        action="append",
        metavar=("ANSWERS", "QUESTION", "SHORTEST", "LONGEST"),
        help="responses to each question, words of a question, of the shortest and the longest response; may be given "
        f"several times (default: {LENGTHS})",
    )
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    works = [
        workload(args.count, answers=answers, question=question, shortest=shortest, longest=longest)
        for answers, question, shortest, longest in args.lengths or LENGTHS
    ]
    with tempfile.TemporaryDirectory() as folder:
        model = args.reward_model or random_reward_model(Path(folder), args.model)
        with server(model, "--device", args.device, "--dtype", args.dtype) as served:
            for work in works:
                print(f"{args.count} responses, {work.name}; {args.device}, {args.dtype}")
                for row in measure(served, work, args.clients, args.repetitions):
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

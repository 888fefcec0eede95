"""What it costs to run reward functions in processes of their own: `python benchmarks/reward_pool.py`.

Milliseconds of a call of one cheap function for a batch, in this process and in the pool, and of one program in the
sandbox. The ways take turns; the median counts, and the fastest says what the machine can do when nobody else asks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rewards.base import load_function
from rewards.pool import PoolFunction, RewardPool
from rewards.sandbox import Limits, check_sandbox, run_program

ANSWER = "Drink enough water and rest. See a doctor if it gets worse. " * 10


def timed(ways: dict[str, Callable[[], object]], repetitions: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each way."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(repetitions + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if repetition:  # the first warms up
                seconds[name].append(time.perf_counter() - began)
    return {
        name: {"median_ms": round(statistics.median(own) * 1e3, 3), "fastest_ms": round(min(own) * 1e3, 3)}
        for name, own in seconds.items()
    }


def pool_overhead(name: str, batch: int, num_workers: int, repetitions: int) -> dict[str, dict[str, float]]:
    """A call of one function for `batch` answers, here and in a pool, whole and in portions of 32."""
    function, prompts, responses = load_function(name), ["What helps?"] * batch, [ANSWER] * batch
    pools = {
        f"pool of {num_workers}, {portion} answers a call": RewardPool(
            {"part": PoolFunction(name=name, samples_per_call=portion)}, num_workers=num_workers
        )
        for portion in dict.fromkeys((batch, min(batch, 32)))
    }
    ways: dict[str, Callable[[], object]] = {"in this process": lambda: function(prompts, responses)}
    try:
        for label, pool in pools.items():
            pool.start()
            ways[label] = lambda pool=pool: pool.score(prompts, responses, {}).result()  # type: ignore[misc]
        return timed(ways, repetitions)
    finally:
        for pool in pools.values():
            pool.close()


def start(num_workers: int) -> dict[str, dict[str, float]]:
    """From nothing to a pool that waits to be asked, and back."""

    def once() -> None:
        pool = RewardPool({"part": PoolFunction(name="text:no_repetition")}, num_workers=num_workers)
        pool.start()
        pool.close()

    return timed({f"starting and ending a pool of {num_workers}": once}, 3)


def sandbox(repetitions: int) -> dict[str, dict[str, float]]:
    """One program that does next to nothing."""
    check_sandbox()
    return timed({"a program in the sandbox": lambda: run_program("print(1)", limits=Limits())}, repetitions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--function", default="text:finished_sentence")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 512], help="answers")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=200)
    given = parser.parse_args()
    for batch in given.batches:
        figures = pool_overhead(given.function, batch, given.workers, given.repetitions)
        print(json.dumps({"answers": batch, **figures}), flush=True)
    print(json.dumps(start(given.workers)), flush=True)
    print(json.dumps(sandbox(max(given.repetitions // 10, 3))), flush=True)


if __name__ == "__main__":
    main()

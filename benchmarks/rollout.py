"""The rollout engines side by side, and what a weight sync costs: `python benchmarks/rollout.py`.

Decoding: 8, 32 and 64 requests at once, SmolLM2-135M in float32, prompts of 16 to 96 tokens, limits of 16 to 96 new
tokens, a seed per request, end-of-sequence ignored so that both engines make the same number of tokens. Each
engine has every core, in a process of its own that sleeps while the other one is measured; measured blocks alternate.

Weight sync: the whole model from a policy to an engine, by phase in one process and in all through Ray actors, next to
the speed at which this machine copies memory. Without vLLM, the transformers engine is measured alone.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from actors.engines import EngineKind, SamplingSettings
from actors.handles import Group, PolicyHandle, RolloutHandle
from actors.launch import local_groups, ray_groups
from actors.policy import PolicyActor
from actors.rollout import RolloutActor
from actors.weight_routes import fetch
from actors.weight_sync import WeightBucket, fingerprint
from actors.worker import Host
from alignment.config import ClusterConfig, ModelConfig, PolicyConfig, PpoConfig, RolloutConfig
from alignment.data.model_assets import resolve_model

ENGINES: tuple[EngineKind, ...] = ("transformers", "vllm")
REQUESTS = (8, 32, 64)
PROMPT_TOKENS, NEW_TOKENS = (16, 96), (16, 96)
SEED = 1
WARM_UP = 8
"""Requests decoded by each engine before the first block."""

Work = tuple[list[list[int]], list[SamplingSettings]]


def work(count: int, repetition: int) -> Work:
    """Prompts and limits, the same for both engines; other ones in every repetition, so that no cache knows them."""
    draw = random.Random(1000 * count + repetition)
    prompts = [[draw.randrange(1000, 40_000) for _ in range(draw.randint(*PROMPT_TOKENS))] for _ in range(count)]
    limits = [draw.randint(*NEW_TOKENS) for _ in range(count)]
    return prompts, [SamplingSettings(max_new_tokens=n, temperature=1.0, stop_ids=frozenset()) for n in limits]


def rollout_actor(kind: EngineKind, model: str, device: str) -> RolloutActor:
    return RolloutActor(
        model_path=model,
        model=ModelConfig(path=model),
        rollout=RolloutConfig(engine=kind, ignore_eos=True, max_batch=max(REQUESTS)),
        seed=SEED,
        device=device,
    )


def policy_actor(model: str, device: str) -> PolicyActor:
    return PolicyActor(
        model_path=model,
        model=ModelConfig(path=model),
        policy=PolicyConfig(),
        ppo=PpoConfig(),
        temperature=1.0,
        total_updates=1,
        seed=SEED,
        device=device,
    )


def engine_process(kind: EngineKind, model: str, device: str, connection: Connection) -> None:
    """Answer (requests, repetition) with (tokens, seconds, seconds of CPU time), until None comes."""
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # the report is alone on stdout
    actor = rollout_actor(kind, model, device)
    started = time.perf_counter()
    where = Host({"rollout": actor}).setup()
    connection.send({"setup_seconds": time.perf_counter() - started, "where": where})
    while (call := connection.recv()) is not None:
        prompts, settings = work(*call)
        start, computing = time.perf_counter(), time.process_time()
        samples = actor.engine.generate(prompts, list(range(len(prompts))), settings)
        seconds, computing = time.perf_counter() - start, time.process_time() - computing
        tokens = sum(len(sample.response_ids) for sample in samples)
        if tokens != sum(setting.max_new_tokens for setting in settings):
            raise RuntimeError(f"{kind}: got {tokens} tokens, expected every request to reach its limit")
        connection.send((tokens, seconds, computing))


@contextlib.contextmanager
def engine(kind: EngineKind, model: str, device: str) -> Iterator[Connection]:
    """The engine in a process of its own, ready and warm."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=engine_process, args=(kind, model, device, there), daemon=True)
    process.start()
    there.close()
    print(f"{kind}: {here.recv()}", file=sys.stderr)
    here.send((WARM_UP, 0))
    here.recv()
    try:
        yield here
    finally:
        here.send(None)
        process.join()


def block(connection: Connection, count: int, repetition: int) -> dict[str, float]:
    """One measurement, and the share of the machine that other programs took meanwhile."""
    busy = busy_seconds()
    connection.send((count, repetition))
    tokens, seconds, computing = connection.recv()
    others = max(0.0, busy_seconds() - busy - computing) / (seconds * (os.cpu_count() or 1))
    return {"tokens": tokens, "seconds": seconds, "others": others}


def busy_seconds() -> float:
    """CPU time that all cores of this machine have spent on anything but waiting."""
    user, nice, system, _, _, interrupts, soft_interrupts, *_ = Path("/proc/stat").read_text().split()[1:9]
    return sum(map(int, (user, nice, system, interrupts, soft_interrupts))) / os.sysconf("SC_CLK_TCK")


def measure_decoding(kinds: tuple[EngineKind, ...], model: str, device: str, repetitions: int) -> dict[str, Any]:
    """By number of requests and engine: every measured block, and the median of their tokens per second."""
    blocks: dict[int, dict[EngineKind, list[dict[str, float]]]] = {n: {kind: [] for kind in kinds} for n in REQUESTS}
    with contextlib.ExitStack() as stack:
        engines = {kind: stack.enter_context(engine(kind, model, device)) for kind in kinds}
        for repetition in range(1, repetitions + 1):
            for count in REQUESTS:
                # Whoever is second finds warmer or colder cores: take turns in going first.
                for kind in kinds if repetition % 2 else kinds[::-1]:
                    measured = block(engines[kind], count, repetition)
                    print(f"{kind}, {count} requests: {measured}", file=sys.stderr, flush=True)
                    blocks[count][kind].append(measured)
    return {str(count): {kind: summary(rows[kind]) for kind in kinds} for count, rows in blocks.items()}


def summary(blocks: list[dict[str, float]]) -> dict[str, Any]:
    return {
        "tokens_per_second": statistics.median(row["tokens"] / row["seconds"] for row in blocks),
        "others": max(row["others"] for row in blocks),
        "blocks": blocks,
    }


def measure_sync(kind: EngineKind, model: str, device: str, repetitions: int, through_ray: bool) -> dict[str, Any]:
    """Seconds of whole-model syncs; of their phases as well where policy and engine share a process."""
    actors = {"policy": policy_actor(model, device), "rollout": rollout_actor(kind, model, device)}
    cluster = ClusterConfig()
    with (ray_groups if through_ray else local_groups)(actors, cluster) as groups:
        policy, rollout = PolicyHandle(groups["policy"]), RolloutHandle(groups["rollout"])
        totals = []
        for version in range(1, repetitions + 2):
            start = time.perf_counter()
            policy.send_weights(rollout, version=version).result()
            totals.append(time.perf_counter() - start)
        result: dict[str, Any] = {"seconds": statistics.median(totals[1:]), "repetitions": totals[1:]}
        if not through_ray:
            result |= phases(groups, repetitions, version=repetitions + 2)
    return result


def phases(groups: dict[str, Group], repetitions: int, version: int) -> dict[str, Any]:
    """Median seconds of each phase. Hashing, done on both sides, and the copy into shared memory are timed by
    themselves on the same buckets, and taken off the calls that contain them."""
    rows = [one_sync(groups, version + i) for i in range(repetitions)]
    return {
        "bytes": rows[0].pop("bytes"),
        "phases": {name: statistics.median(row[name] for row in rows) for name in rows[-1] if name != "bytes"},
    }


def one_sync(groups: dict[str, Group], version: int) -> dict[str, float]:
    def call(role: str, method: str, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        answer = groups[role].call(role, method, *args, **kwargs).result()
        return answer, time.perf_counter() - start

    whole = groups["rollout"].call("rollout", "sync_kind").result() == "whole"
    count, plan = call("policy", "plan_sync", whole=True)
    _, begin = call("rollout", "begin_sync", version=version, buckets=count)
    sent = received = hashing = transfer = size = 0.0
    for index in range(count):
        bucket, seconds = call("policy", "export_bucket", version=version, index=index, whole=True)
        sent += seconds
        received += call("rollout", "receive_bucket", bucket)[1]
        size += bucket.payload.nbytes
        start = time.perf_counter()
        fingerprint(fetch(bucket.payload))
        hashing += time.perf_counter() - start
        transfer += shared_memory_seconds(bucket) if whole else 0.0
    probe, probing = call("policy", "probe", version=version)
    _, finish = call("rollout", "finish_sync", probe, version=version)
    return {
        "bytes": size,
        "pack": plan + sent - hashing,
        "hash": 2 * hashing,
        "transfer": transfer,
        "load": begin + received - hashing - transfer,
        "probe": probing + finish,
    }


def shared_memory_seconds(bucket: WeightBucket) -> float:
    """What handing one bucket to a vLLM worker costs before the worker reads it."""
    from actors.engines.vllm_transfer import described

    start = time.perf_counter()
    with described(bucket):
        return time.perf_counter() - start


def measure_copies(size: int, repetitions: int = 5) -> dict[str, float]:
    """GB/s of copying `size` bytes in memory, by number of threads; each byte is counted once."""
    import torch

    source, target = torch.ones(size // 4), torch.empty(size // 4)
    target.copy_(source)
    speeds, before = {}, torch.get_num_threads()
    for threads in dict.fromkeys((1, os.cpu_count() or 1)):
        torch.set_num_threads(threads)
        best = float("inf")
        for _ in range(repetitions):
            start = time.perf_counter()
            target.copy_(source)
            best = min(best, time.perf_counter() - start)
        speeds[str(threads)] = source.nbytes / best / 1e9
    torch.set_num_threads(before)
    return speeds


def in_a_process_of_its_own(function: Any, *args: Any) -> Any:
    """vLLM sets up its process for good: what is measured next starts from a fresh one."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def sync_process(kind: EngineKind, model: str, device: str, repetitions: int, through_ray: bool) -> dict[str, Any]:
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return measure_sync(kind, model, device, repetitions, through_ray)


def report(figures: dict[str, Any]) -> str:
    lines = [f"{figures['device']}, {figures['threads']} threads; " + ", ".join(figures["versions"])]
    if decoding := figures.get("decoding"):
        kinds = list(next(iter(decoding.values())))
        lines.append(f"{'requests':>8} " + " ".join(f"{kind:>14}" for kind in kinds) + f" {'ratio':>7}   tokens/s")
        for count, row in decoding.items():
            rates = [row[kind]["tokens_per_second"] for kind in kinds]
            ratio = f"{rates[1] / rates[0]:>6.2f}x" if len(rates) > 1 else f"{'':>7}"
            lines.append(f"{count:>8} " + " ".join(f"{rate:>14.0f}" for rate in rates) + f" {ratio}")
        others = max(row[kind]["others"] for row in decoding.values() for kind in kinds)
        lines.append(f"other programs took up to {others:.0%} of the machine meanwhile")
    for kind, row in figures.get("sync", {}).items():
        size = row["bytes"] / 1e9
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in row["phases"].items())
        lines.append(f"weight sync to {kind}: {rate_of(size, row['seconds'])} ({parts})")
        if through_ray := row.get("through_ray"):
            lines.append(f"  through Ray actors: {rate_of(size, through_ray['seconds'])}")
    if copies := figures.get("copies"):
        lines.append("memory copy: " + ", ".join(f"{rate:.1f} GB/s on {n} threads" for n, rate in copies.items()))
    return "\n".join(lines)


def rate_of(gigabytes: float, seconds: float) -> str:
    return f"{gigabytes:.2f} GB in {seconds:.2f} s, {gigabytes / seconds:.2f} GB/s"


def version_of(package: str) -> str:
    """Name and version of the distribution that brings `package`: there are several builds of vLLM."""
    name = importlib.metadata.packages_distributions()[package][0]
    return f"{name} {importlib.metadata.version(name)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3, help="measured blocks of each kind; the median counts")
    parser.add_argument("--part", choices=("decoding", "sync"), help="this one alone; default: both")
    parser.add_argument("--engine", choices=ENGINES, help="this one alone; default: both, vLLM where it is installed")
    parser.add_argument("--no-ray", action="store_true", help="syncs in one process alone")
    parser.add_argument("--output", type=Path, help="also write the figures here, as JSON")
    args = parser.parse_args()
    import torch

    installed = importlib.util.find_spec("vllm") is not None
    kinds = tuple(kind for kind in ENGINES if kind in (args.engine or kind,) and (kind == "transformers" or installed))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = resolve_model("asset:smollm2-135m-instruct")
    packages = ("torch", "transformers", "ray") + (("vllm",) if installed else ())
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "threads": os.cpu_count(),
        "versions": [version_of(package) for package in packages],
    }
    if args.part != "sync":
        figures["decoding"] = measure_decoding(kinds, model, device, args.repetitions)
    if args.part != "decoding":
        figures["sync"] = {}
        for kind in kinds:
            row = in_a_process_of_its_own(sync_process, kind, model, device, args.repetitions, False)
            if not args.no_ray:
                row["through_ray"] = in_a_process_of_its_own(sync_process, kind, model, device, args.repetitions, True)
            figures["sync"][kind] = row
            figures["copies"] = measure_copies(int(row["bytes"]))
    print(report(figures))
    if args.output:
        args.output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()

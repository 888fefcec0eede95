"""What a step costs the driver, by phase, as sequences and engines grow: `python benchmarks/controller.py`.

The driver's code is the real one on real Ray: sharing out, collecting, experience, metrics, rollouts.jsonl. What it
talks to are stand-ins that wait as long as a share might take and answer with records of the right shapes; a few
processes host all engines in threads. Seconds are CPU time of the driver's process: it counts no waiting, and what the
stand-ins take of the other cores does not show. `sent` and `received` are the bytes that it packs and unpacks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import actors.group
from actors.build import PpoRoles, ppo_roles
from actors.engine_pool import Capacity
from actors.group import ActorGroup, EngineGroup
from actors.launch import session
from actors.object_store import Shelf
from actors.worker import Actor
from alignment.config import PpoRunConfig
from alignment.loops.ppo import PpoState, experience_of, shaped_scores
from alignment.loops.run import Run
from alignment.run_directory import RunDirectory
from alignment.scores import score_metrics
from alignment.types import Experience, Prompt, Rollout, Score

SEQUENCES = (64, 512, 4096)
ENGINES = (8, 64, 512)
PROMPT_TOKENS, ANSWER_TOKENS = 512, 1536
HOSTS = 2
"""Processes that play the engines."""
SHARE = 16
"""Sequences that an engine is sent at once."""
WAIT = 0.05
"""Seconds that a share takes on average."""
WORKERS = 2
"""Of each other role."""
PHASES = ("dispatch", "collect", "send", "answers", "experience", "update", "log")


class Sampler(Actor):
    """Answers after a while with as many tokens as asked for."""

    role = "rollout"

    def setup(self, peers: Any) -> None:
        torch.set_num_threads(1)
        self.ids = tuple(range(1000, 1000 + ANSWER_TOKENS))
        self.logprobs = tuple((-0.5 * torch.rand(ANSWER_TOKENS, dtype=torch.float64)).tolist())

    def capacity(self) -> Capacity:
        return Capacity(sequences=SHARE, max_new_tokens=ANSWER_TOKENS)

    def generate(self, prompts: Sequence[Prompt], *, step: int, sample_indices: Sequence[int]) -> list[Rollout]:
        time.sleep(2 * WAIT * random.random())
        return [
            Rollout(
                prompt=prompt,
                sample_index=index,
                response_ids=self.ids[: ANSWER_TOKENS - sum(map(ord, prompt.id)) % 64],
                rollout_logprobs=self.logprobs[: ANSWER_TOKENS - sum(map(ord, prompt.id)) % 64],
                finish_reason="stop",
                response="word " * (ANSWER_TOKENS // 2),
                weight_version=0,
            )
            for prompt, index in zip(prompts, sample_indices, strict=True)
        ]


class Reader(Actor):
    """Any of the other roles: reads what it is given and answers in its shape."""

    def __init__(self, role: str) -> None:
        self.role = role

    def setup(self, peers: Any) -> None:
        torch.set_num_threads(1)

    def logprobs(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        return [torch.tensor(rollout.rollout_logprobs, dtype=torch.float32) for rollout in rollouts]

    values = logprobs

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return [Score(total=1.0 * (i % 3), parts={"model": 1.0 * (i % 3)}) for i, _ in enumerate(rollouts)]

    def update(self, experience: Experience, *, step: int) -> dict[str, float]:
        return {f"{self.role}/sum": float(experience.old_logprobs.sum())}


class HostedEngines(EngineGroup):
    """Many engines in few processes."""

    def _new_worker(self, rank: int, place: Any) -> Any:
        if rank == 0:
            self._options["max_concurrency"] = 256
            self.hosts: list[Any] = []
        if rank < HOSTS:
            self.hosts.append(super()._new_worker(rank, place))
        return self.hosts[rank % HOSTS]


@contextlib.contextmanager
def counted_bytes() -> Iterator[dict[str, int]]:
    """What this process packs for others and unpacks of theirs, at the one place where Ray does either."""
    count = {"sent": 0, "received": 0}
    context = actors.group.ray._private.worker.global_worker.get_serialization_context()
    pack, unpack = context.serialize, context.deserialize_objects

    def packed(value: Any) -> Any:
        done = pack(value)
        count["sent"] += done.total_bytes
        return done

    def unpacked(objects: Any, *others: Any) -> Any:
        count["received"] += sum(len(one.data) for one in objects if one.data is not None)
        return unpack(objects, *others)

    context.serialize, context.deserialize_objects = packed, unpacked
    try:
        yield count
    finally:
        context.serialize, context.deserialize_objects = pack, unpack


class Clock:
    """CPU seconds of this process, all threads, by phase."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.process_time()
        yield
        self.seconds[name] += time.process_time() - began


def one_step(config: PpoRunConfig, prompts: Sequence[Prompt], roles: PpoRoles, run: Run, clock: Clock) -> None:
    """The calls of `train_ppo` between two weight syncs, phase by phase."""
    state, log = PpoState.start(config), run.begin_step(0)
    with clock.phase("dispatch"):
        generating = roles.rollout.generate(prompts, step=0)
    with clock.phase("collect"):
        rollouts = generating.result()
    with clock.phase("send"):
        scoring, old = roles.reward.score(rollouts), roles.policy.logprobs(rollouts)
        ref, values = roles.reference.logprobs(rollouts), roles.critic.values(rollouts)
    with clock.phase("answers"):
        scores, numbers = scoring.result(), (old.result(), ref.result(), values.result())
    with clock.phase("experience"):
        shaped, clipped = shaped_scores(config, state, scores, rollouts)
        experience, described = experience_of(config, state, rollouts, shaped, *numbers)
        log.metrics.update({**score_metrics(scores), **clipped, **described})
    with clock.phase("update"):
        updates = [roles.critic.update(experience, step=0), roles.policy.update(experience, step=0)]
        for update in updates:
            log.metrics.update(update.result())
    with clock.phase("log"):
        run.finish_step(log, rollouts, scores)


def prompts_of(count: int) -> list[Prompt]:
    return [
        Prompt(
            id=f"prompt-{i}",
            messages=({"role": "user", "content": "word " * (PROMPT_TOKENS // 2)},),
            prompt_ids=tuple(range(500, 500 + PROMPT_TOKENS - i % 32)),
        )
        for i in range(count)
    ]


@contextlib.contextmanager
def started(num_engines: int) -> Iterator[PpoRoles]:
    """The roles, on Ray."""
    small: dict[str, Any] = {"cpus_per_worker": 0.01, "threads": 1, "shelf": Shelf()}
    groups: dict[str, ActorGroup] = {
        "rollout": HostedEngines({"rollout": Sampler()}, num_workers=num_engines, **small)
    }  # type: ignore[arg-type]
    for role in ("policy", "critic", "reference", "reward_model"):
        groups[role] = ActorGroup({role: Reader(role)}, num_workers=WORKERS, **small)
    try:
        for group in groups.values():
            processes = list(dict.fromkeys(group.workers))
            actors.group.ray.get([process.setup.remote() for process in processes])
        yield ppo_roles(groups)
    finally:
        for group in groups.values():
            for process in dict.fromkeys(group.workers):
                actors.group.ray.kill(process)


def measure(num_sequences: int, num_engines: int, repetitions: int, folder: Path) -> dict[str, Any]:
    """The median of each phase, and bytes of one step."""
    config = PpoRunConfig.model_validate(
        {
            "reward": {"model": "none"},
            "rollout": {"max_new_tokens": ANSWER_TOKENS},
            "ppo": {"rollout_batch_size": num_sequences, "minibatch_size": num_sequences},
        }
    )
    prompts, clocks = prompts_of(num_sequences), []
    directory = RunDirectory(folder / f"{num_sequences}-{num_engines}-{time.monotonic_ns()}")
    run = Run(directory, num_steps=1, checkpoint_every=1, keep_checkpoints=1)
    with started(num_engines) as roles:
        roles.rollout.generate(prompts[:16], step=0).result()
        for _ in range(repetitions):
            clocks.append(Clock())
            with counted_bytes() as count:
                one_step(config, prompts, roles, run, clocks[-1])
    run.close()
    middle = {name: sorted(clock.seconds[name] for clock in clocks)[len(clocks) // 2] for name in PHASES}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {"sequences": num_sequences, "engines": num_engines, **middle, **count, "peak_mb": peak}


def exponent(rows: Sequence[dict[str, Any]], along: str, phase: str) -> float:
    """The slope of log seconds over log `along`, by least squares: 1 is linear."""
    points = [(math.log(row[along]), math.log(max(row[phase], 1e-4))) for row in rows]
    x, y = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def report(rows: Sequence[dict[str, Any]]) -> str:
    names = [*PHASES, "all"]
    rows = [{**row, "all": sum(row[phase] for phase in PHASES)} for row in rows]
    lines = ["| sequences | engines | " + " | ".join(names) + " | sent, MB | received, MB |"]
    lines.append("|" + "---|" * (len(names) + 4))
    for row in rows:
        seconds = " | ".join(f"{row[name]:.3f}" for name in names)
        moved = f"{row['sent'] / 1e6:.1f} | {row['received'] / 1e6:.1f}"
        lines.append(f"| {row['sequences']} | {row['engines']} | {seconds} | {moved} |")
    for along, other in (("sequences", "engines"), ("engines", "sequences")):
        for fixed in sorted({row[other] for row in rows}):
            chosen = [row for row in rows if row[other] == fixed]
            if len({row[along] for row in chosen}) > 2:
                slopes = " | ".join(f"{exponent(chosen, along, name):+.2f}" for name in names)
                lines.append(f"| exponent over {along} | {other} {fixed} | {slopes} | | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=SEQUENCES)
    parser.add_argument("--engines", type=int, nargs="+", default=ENGINES)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    # The stand-ins are classes of this script, which no other process can import.
    actors.group.ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with session(), tempfile.TemporaryDirectory() as folder:
        for num_engines in given.engines:
            for num_sequences in given.sequences:
                rows.append(measure(num_sequences, num_engines, given.repetitions, Path(folder)))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    if given.output:
        given.output.write_text(json.dumps(rows, indent=1) + "\n")
    print(report(rows))


if __name__ == "__main__":
    main()

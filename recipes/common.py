"""What all recipes share: the command line, starting and resuming, what is printed, and the exit codes.

0 done; 2 refused before starting; 1 failed while running; 130 and 143 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import io
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar

from alignment.config import ClusterConfig, Config, RunConfig
from alignment.config_io import describe, dump_config, load_config
from alignment.memory import MemoryMeter
from alignment.run_directory import BATCHES, RunDirectory, trained
from recipes import checks
from recipes.settling import settle

if TYPE_CHECKING:
    from alignment.interfaces import Saves
    from alignment.loops.run import Run

ROOT = Path(__file__).resolve().parent.parent
ConfigT = TypeVar("ConfigT", bound=Config)


class Record(Protocol):
    """What a run writes once and reads again when it is started again."""

    def save(self, path: Path) -> None: ...
    @classmethod
    def load(cls, path: Path) -> Self: ...


RecordT = TypeVar("RecordT", bound=Record)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlainRecord:
    """A record of plain data: lists, numbers and texts."""

    def save(self, path: Path) -> None:
        from alignment.checkpoint import save_json

        save_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> Self:
        from alignment.checkpoint import load_json

        return cls(**load_json(path))


@dataclass
class Job(Generic[ConfigT]):
    """One invocation of a recipe, checked."""

    name: str
    config: ConfigT
    cluster: ClusterConfig
    cluster_file: Path
    output_dir: Path
    resume: str
    local: bool
    dry_run: bool
    began: float
    memory: MemoryMeter
    earlier_seconds: float = 0.0
    """What the steps took that earlier starts of the run completed."""
    started: bool = False
    """True once actors may exist: from then on an error is a failure (1), before it a refusal (2)."""
    is_of_runs: bool = False
    """Whether the output directory holds runs, each in a folder of its own."""

    @contextlib.contextmanager
    def groups(self, actors: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The roles' processes, in this process with `--local`, on Ray otherwise."""
        from actors.launch import local_groups, ray_groups
        from actors.plan import PlacementError

        opener = local_groups if self.local else ray_groups
        self.started = True
        try:
            with opener(actors, self.cluster) as groups:
                # Ray puts a handler of its own in place when it connects.
                signal.signal(signal.SIGTERM, _terminate)
                yield groups
        except PlacementError:
            self.started = False
            raise


def run_recipe(
    name: str, config_class: type[ConfigT], body: Callable[[Job[ConfigT]], None], argv: list[str] | None = None
) -> int:
    """Parse the command line, run `body`, and turn what happens into an exit code."""
    job: Job[ConfigT] | None = None
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        checks.refuse_intruders()
        job = parse(name, config_class, argv)
        with job.memory:
            body(job)
        return 0
    except KeyboardInterrupt:
        return _end_interrupted(name, job)
    except Exception as error:
        return end_with(name, job, error)
    finally:
        signal.signal(signal.SIGTERM, previous)


def end_with(name: str, job: Job[Any] | None, error: Exception) -> int:
    """The exit code of an error, after a line that a person can act on. The one broad catch of a recipe."""
    if Terminated.asked:  # raised inside a library, the signal may come out as another error
        return _end_interrupted(name, job)
    started = job is not None and job.started
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG and not started:
        error = ValueError(f"{str(error.filename)[:60]}...: got a name too long for a file, expected less; shorten it")
    if isinstance(error, ValueError) and not started:
        _say(f"{name}: refused: {error}")
        return 2
    traceback.print_exception(error)
    where = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    _say(f"{name}: failed: {type(error).__name__}: {error}{where}")
    return 1


def _where_to_go_on(job: Job[Any] | None) -> str:
    """What an interrupted run has on disk."""
    from alignment.checkpoint import CheckpointStore

    if job is not None and job.is_of_runs:
        return "the runs in it that are finished stay so, and the same command goes on"
    if job is not None and (job.output_dir / BATCHES).exists():
        return "the batches that are answered stay so, and the same command goes on"
    steps = CheckpointStore(job.output_dir / "checkpoints", keep=1).complete() if job is not None else []
    if not steps:
        return "no step is on disk yet: the same command starts again"
    return f"step {steps[-1]} is on disk, continue with --resume auto"


class Terminated(KeyboardInterrupt):
    """SIGTERM, as an exception, so that actors are stopped on the way out.

    A KeyboardInterrupt, because that is what Ray lets end a wait; it swallows other exceptions of signal handlers.
    """

    asked = False


def _end_interrupted(name: str, job: Job[Any] | None) -> int:
    _say(f"{name}: {'terminated' if Terminated.asked else 'interrupted'}; {_where_to_go_on(job)}")
    return 143 if Terminated.asked else 130


def _terminate(*_: Any) -> None:
    # A second SIGTERM while stopping must not interrupt the stopping.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Terminated.asked = True
    raise Terminated


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse(name: str, config_class: type[ConfigT], argv: list[str] | None) -> Job[ConfigT]:
    """The fixed flags by argparse; every `--section.key value` goes to the config."""
    parser = argparse.ArgumentParser(
        prog=f"python recipes/{name}.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="keys, each settable as --section.key value:\n\n" + describe(config_class),
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, default=ROOT / "recipes" / "configs" / f"{name}.yaml", help="YAML file")
    parser.add_argument("--cluster", type=Path, default=ROOT / "cluster" / "local.yaml", help="machines, YAML file")
    parser.add_argument("--output-dir", type=Path, default=Path("runs") / name, help="the run's directory")
    parser.add_argument("--resume", default="auto", help="auto (default), never, or a checkpoint folder")
    parser.add_argument("--local", action="store_true", help="one process, no Ray")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start no actor")
    known, overrides = parser.parse_known_args(argv)
    config = load_config(config_class, file=known.config, overrides=overrides)
    cluster = load_config(ClusterConfig, file=known.cluster, overrides=[])
    return Job(
        name=name,
        config=settle(config, cluster),
        cluster=cluster,
        cluster_file=known.cluster,
        output_dir=known.output_dir,
        resume=known.resume,
        local=known.local,
        dry_run=known.dry_run,
        began=time.monotonic(),
        memory=MemoryMeter(interval=2.0),
    )


def open_run_directory(job: Job[Any], *, num_bytes: int = 0) -> tuple[RunDirectory, Path | None]:
    """Create and lock the run directory; the verified checkpoint to resume from, or None for a fresh start.

    `num_bytes`: what a fresh start will need on disk.
    """
    directory, chosen = claim_run_directory(job)
    if chosen is not None:
        job.earlier_seconds = directory.seconds_of_steps(before=int(chosen.name.removeprefix("step_")))
    else:
        directory.require_space(num_bytes)
        # What an attempt without a usable checkpoint logged would stand there twice.
        directory.truncate_after(-1)
    return directory, chosen


def claim_run_directory(job: Job[Any]) -> tuple[RunDirectory, Path | None]:
    """As `open_run_directory`, with what earlier starts have logged left as it is."""
    directory = RunDirectory(job.output_dir)
    directory.lock()
    chosen, passed_over = checks.checkpoint_to_resume(job)
    for line in passed_over:
        _say(line)
    if not trained(directory.path):
        directory.forget_start()
    if not directory.config.exists():
        directory.write_text_atomic(directory.config, dump_config(job.config))
    return directory, chosen


def restore(job: Job[Any], run: Run, chosen: Path, parts: Mapping[str, Saves]) -> dict[str, Any]:
    """Load a checkpoint, and only then let go of what was trained after the one that `--resume PATH` names."""
    state: dict[str, Any] = run.restore(chosen, parts)
    if job.resume != "auto":
        # It belongs to another future: a later --resume auto must not jump back there.
        run.store.discard_after(state["step"])
    return state


def main_of(recipe: str) -> Callable[[list[str]], int]:
    """What runs an upstream recipe, by its name. Imported when it is needed: recipes may begin with each other's."""
    main: Callable[[list[str]], int] = importlib.import_module(f"recipes.{recipe}").main
    return main


def check_first(job: Job[Any], recipe: Callable[[list[str]], int], output_dir: Path) -> None:
    """Let an upstream recipe refuse what it would refuse, while nothing of this run is on disk."""
    with contextlib.redirect_stdout(io.StringIO()):
        _pass_on(recipe([*_upstream_flags(job, output_dir), "--dry-run"]), output_dir)


def train_first(job: Job[Any], recipe: Callable[[list[str]], int], output_dir: Path) -> None:
    """Run an upstream recipe whose result this run needs, on the same machines."""
    _say(f"{job.name}: {output_dir}/final is not there yet; training it first")
    with contextlib.ExitStack() as stack:
        if not job.local:
            from actors.launch import session

            stack.enter_context(session())
        _pass_on(recipe(_upstream_flags(job, output_dir)), output_dir)


def _upstream_flags(job: Job[Any], output_dir: Path) -> list[str]:
    return ["--cluster", str(job.cluster_file), "--output-dir", str(output_dir)] + ["--local"] * job.local


def _pass_on(code: int, output_dir: Path) -> None:
    """End this run as the upstream one ended, unless that went well."""
    if code == 130:
        raise KeyboardInterrupt
    if code == 2:
        raise ValueError(f"{output_dir}: got a refusal of the upstream recipe, expected it to run; see above")
    if code:
        raise RuntimeError(f"{output_dir}: the upstream recipe ended with exit code {code}; see above")


def make_run(directory: RunDirectory, run: RunConfig, *, model_path: str, eos_is_trained: bool = True) -> Run:
    """Unpack a RunConfig."""
    import torch
    import transformers

    from actors.engines.vllm_compat import installed
    from alignment.loops.run import Run

    return Run(
        directory,
        num_steps=run.num_steps,
        checkpoint_every=run.checkpoint_every,
        keep_checkpoints=run.keep_checkpoints,
        trackers=run.trackers,
        eos_is_trained=eos_is_trained,
        provenance={
            "model": model_path,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "vllm": installed() or "not installed",
        },
    )


def once(path: Path, record: type[RecordT], make: Callable[[], RecordT]) -> RecordT:
    """The saved record of an earlier start of this run, or a new one, saved.

    Raises:
        ValueError: the file is damaged. It cannot be made again: the policy has moved since.
    """
    if path.exists():
        try:
            return record.load(path)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: got a damaged record ({type(error).__name__}), expected what the run wrote before its first "
                "step; restore the file, or choose another --output-dir"
            ) from error
    made = make()
    made.save(path)
    return made


def write_summary(
    job: Job[Any], directory: RunDirectory, held_out: Mapping[str, Any], *, what: str = "model", **extra: Any
) -> None:
    """`summary.json`, and its table on the screen. `what`: lies in `final`."""
    summary = {
        "recipe": job.name,
        "seed": job.config.run.seed,
        "seconds": round(job.earlier_seconds + time.monotonic() - job.began, 1),
        "peak_memory_mb": round(job.memory.peak_mb),
        "held_out": dict(held_out),
        **extra,
    }
    directory.write_text_atomic(directory.summary, json.dumps(summary, indent=2) + "\n")
    lines = [f"{'held-out':<34} {'before':>8} {'after':>8} {'gain, 95% interval':>24}"]
    for name, row in held_out.items():
        low, high = row["gain_ci95"]
        lines.append(
            f"{name:<34} {row['before']:>8.3f} {row['after']:>8.3f} {low:>+13.3f} .. {high:+.3f}  n={row['n']}"
        )
    if kl := extra.get("kl"):
        lines.append(f"KL to the reference: {kl['value']:.2f} nats per answer, limit {kl['limit']}")
    if held_out:
        print("\n".join(lines))
    print(f"wrote {directory.path}/summary.json, {what} in {directory.final}", flush=True)


def compare_items(
    before: Mapping[str, Any], after: Mapping[str, Any], seed: int, *, groups: Sequence[Hashable] | None = None
) -> dict[str, Any]:
    """One row of `held_out` from two reports with a 0 / 1 per item. `groups`: as for `paired_bootstrap`."""
    from alignment.bootstrap import paired_bootstrap

    _, low, high = paired_bootstrap(before["correct"], after["correct"], groups=groups, seed=seed)
    return {
        "before": before["accuracy"],
        "after": after["accuracy"],
        "after_ci95": after["accuracy_ci95"],
        "n": after["n"],
        "gain_ci95": [low, high],
        "higher_is_better": True,
    }

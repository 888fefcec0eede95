"""Will it fit, and how long will it take? `python -m alignment.plan --config recipes/configs/ppo_medical.yaml`.

Reads a recipe's config and a cluster's, no weights, and prints the memory of every role, where each process would
stand, the time of a step where rates are known, and what would make a run fit that does not. docs/planner.md says
what is arithmetic and what was measured. Exit code 0: it fits; 2: it does not, or was refused.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml

from alignment.config import (
    ClusterConfig,
    DpoRunConfig,
    IterativeRunConfig,
    KtoRunConfig,
    LiveRunConfig,
    PpoRunConfig,
    RankedRunConfig,
    RankRunConfig,
    RecommenderRunConfig,
    RewardModelRunConfig,
    SftRunConfig,
)
from alignment.config_io import load_config
from alignment.planning.placement import Machines, place, placement_table
from alignment.planning.processes import (
    ProcessMemory,
    memory_table,
    ppo_processes,
    ranking_processes,
    reward_shape_names,
)
from alignment.planning.rows import (
    iterative_processes,
    preference_processes,
    reward_model_processes,
    sft_processes,
)
from alignment.planning.shape import SHAPES, ModelShape, named_shape, read_shape
from alignment.planning.speed import (
    CPU_EFFICIENCY,
    GPU_EFFICIENCY,
    KNOWN,
    Rates,
    calibrate,
    phase_seconds,
    speed_table,
)
from alignment.planning.suggest import RunAnyConfig, Scenario, suggestions

GB = 2**30


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args, overrides = parser().parse_known_args(argv)
    try:
        return plan(args, overrides)
    except ValueError as error:
        print(f"plan: refused: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    here = this_machine()
    made = argparse.ArgumentParser(
        prog="python -m alignment.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="every --section.key value goes to the config, as in the recipes",
        allow_abbrev=False,
    )
    made.add_argument("--config", type=Path, required=True, help="a recipe's YAML file")
    made.add_argument("--cluster", type=Path, default=Path("cluster/local.yaml"), help="machines, YAML file")
    made.add_argument("--shape", choices=sorted(SHAPES), help="plan with this shape instead of the config's models")
    made.add_argument("--nodes", type=int, default=1)
    made.add_argument("--gpus-per-node", type=int, default=here.gpus_per_node)
    made.add_argument("--gpu-memory-gb", type=float, default=here.gpu_memory_gb)
    made.add_argument("--cpus-per-node", type=float, default=here.cpus_per_node)
    made.add_argument("--node-memory-gb", type=float, default=here.node_memory_gb)
    made.add_argument("--calibrate", action="store_true", help="measure this machine's rates, a few seconds")
    made.add_argument("--gpu", choices=sorted(KNOWN), help="take the rates of a known GPU")
    made.add_argument("--matmul-tflops", type=float, help="rate of matrix products of one GPU (or CPU)")
    made.add_argument("--memory-gbps", type=float, help="its rate of memory")
    made.add_argument("--efficiency", type=float, help="share of the first that training reaches")
    return made


def plan(args: argparse.Namespace, overrides: list[str]) -> int:
    config = load_run(args.config, overrides)
    cluster = load_config(ClusterConfig, file=args.cluster, overrides=[])
    shapes = named_shapes(args.shape) if args.shape else config_shapes(config)
    scenario = Scenario(
        config=config,
        cluster=cluster,
        machines=described(args),
    )
    print(f"{shapes['policy'].num_parameters() / 1e6:.1f} M parameters, {config.model.dtype}")
    fits, text = verdict(scenario, shapes)
    print(text)
    if (rates := rates_of(args, config, cluster, shapes)) is not None and isinstance(config, PpoRunConfig):
        phases = phase_seconds(config, cluster, shapes, rates)
        gpus = sum(p.gpus * p.num_workers for p in processes_of(scenario, shapes))
        print(speed_table(phases, steps=config.run.num_steps, gpus=gpus, rates=rates))
    return 0 if fits else 2


def verdict(scenario: Scenario, shapes: Mapping[str, ModelShape]) -> tuple[bool, str]:
    """Whether it fits, and the tables that show why."""
    processes = processes_of(scenario, shapes)
    placed = place(processes, scenario.machines)
    lines = [memory_table(processes), placement_table(placed, scenario.machines)]
    if not placed.fits:
        found = suggestions(scenario, lambda other: processes_of(other, shapes))
        lines += [f"would fit: {words}" for words in found] or [
            "nothing that was tried fits: smaller models, or machines with more memory"
        ]
    return placed.fits, "\n".join(lines)


def processes_of(scenario: Scenario, shapes: Mapping[str, ModelShape]) -> list[ProcessMemory]:
    config, cluster = scenario.config, scenario.cluster
    if isinstance(config, RewardModelRunConfig):
        return reward_model_processes(config, cluster, shapes["policy"])
    if isinstance(config, DpoRunConfig | KtoRunConfig | LiveRunConfig):
        return preference_processes(config, cluster, shapes["policy"])
    if isinstance(config, SftRunConfig):
        return sft_processes(config, cluster, shapes["policy"])
    engine, gpu_bytes = sampling_engine(config, cluster), scenario.machines.gpu_memory_gb * GB
    if isinstance(config, IterativeRunConfig):
        return iterative_processes(config, cluster, shapes, engine=engine, gpu_bytes=gpu_bytes)
    if isinstance(config, RankRunConfig):
        return ranking_processes(config, cluster, shapes, engine=engine, gpu_bytes=gpu_bytes)
    return ppo_processes(config, cluster, shapes, engine=engine, gpu_bytes=gpu_bytes)


def sampling_engine(config: PpoRunConfig | RankedRunConfig, cluster: ClusterConfig) -> str:
    """What the recipe names, else the cluster, else vLLM where it is importable here."""
    named = config.rollout.engine if config.rollout.engine != "auto" else cluster.rollout.engine
    return named if named != "auto" else "vllm" if importlib.util.find_spec("vllm") else "transformers"


def load_run(file: Path, overrides: list[str]) -> RunAnyConfig:
    """A recipe's config: that of a learner alone has a section `training`, and `dpo` or `kto` beside it, or several
    sources where it is a supervised one's; that of a recommender has a section `films`, and `live` where it learns
    from choices; that of a ranking has a section `ranking`, and `rounds` beside it where the policy learns from it."""
    if not file.is_file():
        raise ValueError(f"--config: got {file}, which is no file, expected a recipe's YAML file; correct the path")
    try:
        sections = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"--config: got {file}, which is no YAML ({error}), expected one; mend it") from error
    if "films" in sections:
        if "live" in sections:
            return load_config(LiveRunConfig, file=file, overrides=overrides)
        return load_config(RecommenderRunConfig, file=file, overrides=overrides)
    if "rounds" in sections:
        return load_config(IterativeRunConfig, file=file, overrides=overrides)
    if "dpo" in sections:
        return load_config(DpoRunConfig, file=file, overrides=overrides)
    if "kto" in sections:
        return load_config(KtoRunConfig, file=file, overrides=overrides)
    if "training" in sections:
        if "sources" in (sections.get("data") or {}):
            return load_config(SftRunConfig, file=file, overrides=overrides)
        return load_config(RewardModelRunConfig, file=file, overrides=overrides)
    if "ranking" in sections:
        return load_config(RankRunConfig, file=file, overrides=overrides)
    return load_config(PpoRunConfig, file=file, overrides=overrides)


def named_shapes(name: str) -> dict[str, ModelShape]:
    return dict.fromkeys(("policy", "critic", "reward_model"), named_shape(name))


def config_shapes(config: RunAnyConfig) -> dict[str, ModelShape]:
    """Of the models that a config names; a reward model that is yet to be trained is taken for the policy's size."""
    from alignment.data.model_assets import resolve_model

    policy = read_shape(resolve_model(config.model.path, config.model.revision), config.model.revision)
    shapes = dict.fromkeys(("policy", "critic", "reward_model"), policy)
    if not isinstance(config, PpoRunConfig | RankedRunConfig):
        return shapes
    if isinstance(config, PpoRunConfig) and config.critic.path is not None:
        shapes["critic"] = read_shape(
            resolve_model(config.critic.path, config.critic.revision), config.critic.revision
        )
    for name, path in reward_shape_names(config).items():
        if (Path(path).expanduser() / "config.json").is_file():
            revision = config.reward.revision if path == config.reward.model else None
            shapes[name] = read_shape(str(Path(path).expanduser()), revision)
    return shapes


def this_machine() -> Machines:
    """The one this runs on."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.cuda.get_device_properties(0).total_memory / GB if gpus else 80.0
    return Machines(
        gpus_per_node=gpus,
        gpu_memory_gb=round(device, 1),
        cpus_per_node=float(os.cpu_count() or 1),
        node_memory_gb=round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GB, 1),
    )


def described(args: argparse.Namespace) -> Machines:
    """The machines of the command line.

    Raises:
        ValueError: a number that no machine has.
    """
    for name in ("nodes", "cpus_per_node", "node_memory_gb", "gpu_memory_gb"):
        if not getattr(args, name) > 0:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag}: got {getattr(args, name)}, expected more than 0; describe a machine")
    if args.gpus_per_node < 0:
        raise ValueError(f"--gpus-per-node: got {args.gpus_per_node}, expected 0 or more; describe a machine")
    return Machines(
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        gpu_memory_gb=args.gpu_memory_gb,
        cpus_per_node=args.cpus_per_node,
        node_memory_gb=args.node_memory_gb,
    )


def rates_of(
    args: argparse.Namespace, config: RunAnyConfig, cluster: ClusterConfig, shapes: Mapping[str, ModelShape]
) -> Rates | None:
    """Measured, known or given; None where nobody knows.

    Raises:
        ValueError: one of the two rates without the other.
    """
    given = (args.matmul_tflops, args.memory_gbps)
    if any(given) and not all(rate and rate > 0 for rate in given):
        raise ValueError(
            f"--matmul-tflops, --memory-gbps: got {given}, expected both above 0; give both, or --calibrate"
        )
    on_gpu = cluster.policy.gpus_per_worker > 0
    usual = GPU_EFFICIENCY if on_gpu else CPU_EFFICIENCY
    if all(given):
        return Rates(tflops=args.matmul_tflops, gbps=args.memory_gbps, efficiency=args.efficiency or usual)
    if args.calibrate:
        measured = calibrate(shapes["policy"], dtype=config.model.dtype, device="cuda" if on_gpu else "cpu")
        return Rates(tflops=measured.tflops, gbps=measured.gbps, efficiency=args.efficiency or usual)
    if args.gpu:
        known = KNOWN[args.gpu]
        return Rates(tflops=known.tflops, gbps=known.gbps, efficiency=args.efficiency or known.efficiency)
    return None


if __name__ == "__main__":
    sys.exit(main())

"""What `--dry-run` prints: what the batch words come to, the processes, their memory, and whether it fits."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.config import ClusterConfig, MicroBatchConfig

if TYPE_CHECKING:
    from alignment.data.split import Split
    from alignment.types import Prompt
    from recipes.common import Job


def batch_arithmetic(config: Any, cluster: ClusterConfig) -> str:
    """One line per role: what the batch words come to."""
    ppo = config.ppo
    sequences = ppo.rollout_batch_size * ppo.num_samples_per_prompt
    updates = sequences // ppo.minibatch_size
    lines = [
        f"{ppo.rollout_batch_size} prompts x {ppo.num_samples_per_prompt} samples = {sequences} sequences a step",
        f"{sequences} sequences = {updates} minibatches x {ppo.minibatch_size}, {ppo.ppo_epochs} epochs: "
        f"{updates * ppo.ppo_epochs} optimiser steps a step, {updates * ppo.ppo_epochs * config.run.num_steps} in all",
    ]
    for role, settings in (("policy", config.policy), ("critic", config.critic)):
        workers = getattr(cluster, role).num_workers
        longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
        in_words = _micro_batches_in_words(settings, ppo.minibatch_size, workers, longest, "sequence")
        lines.append(f"{role}: {ppo.minibatch_size} = {in_words}")
    return "\n".join(lines)


def _micro_batches_in_words(settings: MicroBatchConfig, rows: int, workers: int, longest: int, row: str) -> str:
    """How many forwards a worker accumulates over its share of `rows`, each row of at most `longest` tokens."""
    limit, share = settings.micro_batch_limit(), -(-rows // workers)
    size = min(limit.rows or share, share if limit.tokens is None else limit.tokens // longest)
    # Workers share out tokens, not rows: one with short rows has more of them.
    count = f"{'up to' if workers == 1 else 'about'} {-(-share // size)} accumulated micro-batches"
    if limit.tokens is None:
        return f"{count} x {size} {row}s x {workers} workers"
    bound = f" and {limit.rows} {row}s" if limit.rows else ""
    full = f"{limit.tokens // longest} where each {row} has the longest {longest} tokens, more where they are shorter"
    return f"{count} x at most {limit.tokens} tokens{bound} ({full}) x {workers} workers"


def engine_in_words(config: Any, cluster: ClusterConfig) -> str:
    """What samples, and by which settings it was chosen."""
    from actors.engines import choose_engine
    from actors.engines.vllm_compat import installed

    kind = choose_engine(config.rollout.engine, cluster.rollout.engine)
    which = f"vLLM {installed()}" if kind == "vllm" else "transformers"
    return f"{which} (recipe {config.rollout.engine}, cluster {cluster.rollout.engine})"


def memory_plan(job: Job[Any]) -> str:
    """The memory of every role and process, and whether it fits, where the machine is known to be this one."""
    from alignment.plan import config_shapes, processes_of, this_machine, verdict
    from alignment.planning.processes import memory_table
    from alignment.planning.suggest import Scenario

    here = Scenario(config=job.config, cluster=job.cluster, machines=this_machine())
    shapes = config_shapes(job.config)
    if os.environ.get("RAY_ADDRESS") and not job.local:
        return memory_table(processes_of(here, shapes))
    return verdict(here, shapes)[1]


def ppo_plan(job: Job[Any], num_parameters: int, data: str, first: Iterable[Path]) -> str:
    """What `--dry-run` prints. `first`: run directories of what would be trained first."""
    from actors.plan import describe_plan, plan_processes

    return "\n".join(
        [
            f"prompts: {data}; {num_parameters / 1e6:.1f} M parameters",
            f"rollout engine: {engine_in_words(job.config, job.cluster)}",
            *(f"{folder}/final is not there yet: it would be trained first" for folder in first),
            batch_arithmetic(job.config, job.cluster),
            describe_plan(plan_processes(job.cluster)),
            memory_plan(job),
            "dry run: no actor was started",
        ]
    )


def rank_plan(job: Job[Any], num_parameters: int, prompts: Split[Prompt], first: Iterable[Path]) -> str:
    """What `--dry-run` prints. `first`: run directories of what would be trained first."""
    from actors.plan import describe_plan, plan_processes
    from alignment.loops.ranking import num_batches

    ranking, count = job.config.ranking, len(prompts.train)
    answers = f"{count} prompts x {ranking.num_samples_per_prompt} samples = {count * ranking.num_samples_per_prompt}"
    return "\n".join(
        [
            f"prompts: {prompts.summary()}; {num_parameters / 1e6:.1f} M parameters",
            f"rollout engine: {engine_in_words(job.config, job.cluster)}",
            *(f"{folder}/final is not there yet: it would be trained first" for folder in first),
            f"{answers} answers in {num_batches(count, ranking.batch_size)} batches of {ranking.batch_size} prompts",
            f"at most {ranking.pairs_per_prompt} pairs of a prompt: {count * ranking.pairs_per_prompt} in all",
            describe_plan(plan_processes(job.cluster, ("reward_model", "rollout"))),
            memory_plan(job),
            "dry run: no actor was started",
        ]
    )


def iterative_plan(job: Job[Any], num_parameters: int, data: str, first: Iterable[Path]) -> str:
    """What `--dry-run` prints. `first`: run directories of what would be trained first."""
    from actors.plan import describe_plan, plan_processes

    config, ranking, rounds = job.config, job.config.ranking, job.config.rounds
    training, workers = config.training, job.cluster.policy.num_workers
    in_words = _micro_batches_in_words(training, training.batch_size, workers, 2 * config.max_tokens, "pair")
    answers = rounds.prompts_per_round * ranking.num_samples_per_prompt
    return "\n".join(
        [
            f"prompts: {data}; {num_parameters / 1e6:.1f} M parameters",
            f"rollout engine: {engine_in_words(config, job.cluster)}",
            *(f"{folder}/final is not there yet: it would be trained first" for folder in first),
            f"{config.num_rounds} rounds x {rounds.prompts_per_round} prompts x {ranking.num_samples_per_prompt} "
            f"samples = {config.num_rounds * answers} answers",
            f"{config.num_rounds} rounds x {rounds.steps_per_round} steps x {training.batch_size} pairs, of which "
            f"{rounds.replay_share:.0%} from earlier rounds",
            f"{training.batch_size} pairs a step = {in_words}",
            describe_plan(plan_processes(job.cluster, ("policy", "reward_model", "rollout"))),
            memory_plan(job),
            "dry run: no actor was started",
        ]
    )


def sft_plan(job: Job[Any], num_parameters: int, data: str) -> str:
    """What `--dry-run` prints."""
    from actors.plan import describe_plan, plan_processes

    training, workers = job.config.training, job.cluster.policy.num_workers
    longest = job.config.data.max_tokens
    in_words = _micro_batches_in_words(training, training.batch_size, workers, longest, "example")
    return "\n".join(
        [
            f"examples: {data}; {num_parameters / 1e6:.1f} M parameters",
            f"{training.batch_size} examples a step = {in_words}",
            describe_plan(plan_processes(job.cluster, ("policy",))),
            memory_plan(job),
            "dry run: no actor was started",
        ]
    )


def preference_plan(job: Job[Any], num_parameters: int, data: str, *, row: str, sequences: int) -> str:
    """What `--dry-run` prints. `row`: what a row is called, of so many sequences."""
    from actors.plan import describe_plan, plan_processes

    training, workers = job.config.training, job.cluster.policy.num_workers
    longest = sequences * job.config.data.max_tokens
    in_words = _micro_batches_in_words(training, training.batch_size, workers, longest, row)
    return "\n".join(
        [
            f"{data}; {num_parameters / 1e6:.1f} M parameters",
            f"{training.batch_size} {row}s a step = {in_words}",
            describe_plan(plan_processes(job.cluster, ("policy",))),
            memory_plan(job),
            "dry run: no actor was started",
        ]
    )


def reward_model_plan(job: Job[Any], num_parameters: int, data: str) -> str:
    """What `--dry-run` prints."""
    from actors.plan import describe_plan, plan_processes

    training, workers = job.config.training, job.cluster.reward_model.num_workers
    longest = job.config.data.sequences_per_row * job.config.data.max_tokens
    in_words = _micro_batches_in_words(training, training.batch_size, workers, longest, "row")
    return "\n".join(
        [
            f"{data}; {num_parameters / 1e6:.1f} M parameters",
            f"{training.batch_size} rows a step = {in_words}",
            describe_plan(plan_processes(job.cluster, ("reward_model",))),
            memory_plan(job),
            "dry run: no actor was started",
        ]
    )

"""What ranking recipes share: from a checked config to rows of preference data in `final/`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from actors.build import rank_actors, rank_roles
from actors.engines import choose_engine
from actors.reward import pool_functions
from alignment.config import AdapterConfig, RankedRunConfig, RankRunConfig, RewardConfig
from alignment.config_io import dump_config
from alignment.data.chat import load_tokenizer
from alignment.data.prompts import PromptSet, load_prompts
from alignment.fingerprint import model_fingerprint, records_fingerprint
from alignment.label_losses import imbalance
from alignment.loops.ranking import AnsweredBatch, AnswerLog, answer_prompts, num_batches
from alignment.loops.run import Run
from alignment.model_card import write_data_card
from alignment.model_checks import check_model
from alignment.ranking import preference_data, rows_to_label, table
from alignment.run_directory import RunDirectory
from alignment.types import Prompt
from recipes import checks, common, planning
from rewards.base import columns_read, load_function


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """What the run begins with, all of it checked."""

    config: RankRunConfig
    """With the path of every model as transformers takes it."""
    prompts: PromptSet
    num_parameters: int
    first: dict[str, Any]
    """Recipes that have yet to train one of the models, and the run directory of each."""


def check(job: common.Job[RankRunConfig]) -> Start:
    """Refuse whatever would fail later; nothing on disk is changed, no actor is started."""
    config = job.config
    hosts = ["rollout", *(["reward_model"] if config.reward.model is not None else [])]
    checks.check_machines(job.cluster, ("reward_model", "rollout"), local=job.local)
    checks.check_attention(config.model, job.cluster, hosts)
    choose_engine(config.rollout.engine, job.cluster.rollout.engine)
    model, reward = checks.resolve_policy(config.model), checks.resolve_reward(config.reward, config.model)
    config = config.model_copy(update={"model": model, "reward": reward})
    tokenizer = load_tokenizer(model.path, model.revision)
    checks.check_stops(config.rollout, tokenizer)
    num_parameters = check_model("rollout", model, tokenizer, lengths=checks.answer_lengths(config))
    checks.check_reward_models(config)
    checks.check_rollout(config, job.cluster, AdapterConfig(), local=job.local)
    prompts = load_prompts(config.data, tokenizer)
    checks.check_reward_functions(reward, prompts.train)
    check_plain(prompts.train, read_columns(reward))
    first = checks.untrained(job.config)
    for recipe, folder in first.items():
        common.check_first(job, common.main_of(recipe), folder)
    return Start(config=config, prompts=prompts, num_parameters=num_parameters, first=first)


def read_columns(reward: RewardConfig) -> frozenset[str]:
    """Columns of the data that the reward functions look at, gold ones too."""
    functions = pool_functions(reward).values()
    return frozenset(name for one in functions for name in columns_read(load_function(one.name), one.settings))


def check_plain(prompts: Iterable[Prompt], columns: Iterable[str]) -> None:
    """Refuse columns that JSON cannot hold: they are written beside the answers.

    Raises:
        ValueError: naming the column and the prompt.
    """
    names = sorted(columns)
    for prompt in prompts:
        for name in names:
            try:
                json.dumps(prompt.columns.get(name), allow_nan=False)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"column {name!r}, prompt {prompt.id}: got a {type(prompt.columns[name]).__name__} that JSON "
                    f"cannot hold ({error}), expected text, finite numbers, lists of them; convert the column"
                ) from error


def inputs(config: RankedRunConfig, prompts: Sequence[Prompt]) -> dict[str, str]:
    """A short name for the contents of all that a run reads."""
    scoring = {f"reward model{f' {k}' if k else ''}": path for k, path in enumerate(config.reward.models)}
    models = {"model": config.model.path, **scoring}
    return {
        **{name: model_fingerprint(path, config.model.revision) for name, path in models.items()},
        "prompts": records_fingerprint(prompts),
    }


def run_ranking(job: common.Job[RankRunConfig]) -> None:
    """The body of a ranking recipe."""
    start = check(job)
    if job.dry_run:
        checks.check_start(job)
        known = replace(job, config=start.config)
        print(planning.rank_plan(known, start.num_parameters, start.prompts, start.first.values()))
        return
    print(f"prompts: {start.prompts.summary()}", flush=True)
    print(f"rollout engine: {planning.engine_in_words(start.config, job.cluster)}", flush=True)
    directory, _ = common.claim_run_directory(job)
    for recipe, folder in start.first.items():
        common.train_first(job, common.main_of(recipe), folder)
    if start.first:
        start = check(job)
    read = inputs(start.config, start.prompts.train)
    directory.keep_inputs(read)
    batches = answer(job, start, directory)
    write_rows(job, start, directory, batches, read)


def answer(job: common.Job[RankRunConfig], start: Start, directory: RunDirectory) -> list[AnsweredBatch]:
    """All batches: those of earlier starts from the disk, the others from the policy."""
    config, prompts, log = start.config, start.prompts.train, AnswerLog(directory.batches)
    count = num_batches(len(prompts), config.ranking.batch_size)
    done = log.read()
    directory.truncate_after(len(done) - 1)
    job.earlier_seconds = directory.seconds_of_steps(before=len(done))
    if len(done) == count:
        return done
    run = Run(directory, num_steps=count, checkpoint_every=count, keep_checkpoints=1)
    with job.groups(rank_actors(config, job.cluster, model_path=config.model.path)) as groups:
        roles = rank_roles(groups, engine_limits=job.cluster.rollout.engine_limits)
        done = answer_prompts(
            prompts,
            rollout=roles.rollout,
            reward=roles.reward,
            batch_size=config.ranking.batch_size,
            log=log,
            run=run,
            scoring=config.reward,
            max_new_tokens=config.rollout.max_new_tokens,
            num_samples=config.ranking.num_samples_per_prompt,
            columns=read_columns(config.reward),
        )
    run.close()
    return done


def write_rows(
    job: common.Job[RankRunConfig],
    start: Start,
    directory: RunDirectory,
    batches: Sequence[AnsweredBatch],
    read: dict[str, str],
) -> None:
    """`final/`, the card last: it says that the files beside it are whole."""
    ranking, answers = job.config.ranking, [answer for batch in batches for answer in batch.answers]
    unscored = sum((Counter(batch.unscored) for batch in batches), Counter[str]())
    made = preference_data(
        answers,
        pairs_per_prompt=ranking.pairs_per_prompt,
        min_gap=ranking.min_gap,
        label_threshold=ranking.label_threshold,
        on_cut=ranking.on_cut,
        seed=job.config.run.seed,
    )
    figures = {**made.figures, **{f"unscored_{kind}": count for kind, count in sorted(unscored.items())}}
    directory.final.mkdir(exist_ok=True)
    rows = {"answers": [answer.row() for answer in answers], "pairs": made.pairs, "labels": made.labels}
    if ranking.num_to_label:
        rows["to_label"] = rows_to_label(
            answers, most=ranking.num_to_label, unsure_by=ranking.unsure_by, on_cut=ranking.on_cut
        )
    for name, own in rows.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in own)
        directory.write_text_atomic(directory.final / f"{name}.jsonl", text)
    print(table(figures))
    if advice := imbalance(figures["desirable"], figures["undesirable"]):
        print(f"labels: {advice}")
    if not made.pairs:
        print("pairs: got none; raise ranking.num_samples_per_prompt or rollout.temperature, or lower ranking.min_gap")
    common.write_summary(job, directory, {}, what="rows", ranking=figures)
    write_data_card(
        directory.final,
        recipe=job.name,
        model=job.config.model.path,
        config=dump_config(job.config),
        prompts=start.prompts.summary(),
        inputs=read,
        figures=table(figures),
    )

"""What recipes in rounds share: from a checked config to `final/`, with the held-out answers before and after."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from actors.build import IterativeRoles, iterative_actors, iterative_roles
from actors.engines import choose_engine
from alignment.config import IterativeRunConfig, SourceConfig
from alignment.config_io import dump_config
from alignment.data.chat import eos_ids_of_model, load_tokenizer
from alignment.data.preferences import encode_pairs
from alignment.data.prompts import PromptSet, load_prompts, prompts_for_step
from alignment.data.reading import Encoder
from alignment.data.sources import Row, read_rows
from alignment.labelling import asked_rows, check_labelled, labelled_pairs
from alignment.loops.evaluation import HeldOut, answer_table, compare, evaluate, unscored_warning
from alignment.loops.iterative import IterativeState, RankedRound, answer_figures, rank_round, train_in_rounds
from alignment.loops.ranking import AnsweredBatch
from alignment.loops.run import Run
from alignment.metrics import check_trackers
from alignment.model_card import write_model_card
from alignment.model_checks import check_model
from alignment.ranking import by_prompt, rows_to_label, score_figures
from alignment.run_directory import RunDirectory
from recipes import checks, common, planning
from recipes.preference_tuning import learner_bytes, refuse_split_adapter
from recipes.ranking import check_plain, inputs, read_columns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Job = common.Job[IterativeRunConfig]


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """What the run begins with, all of it checked."""

    config: IterativeRunConfig
    """With the path of every model as transformers takes it."""
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptSet
    num_parameters: int
    first: dict[str, Path]
    """Recipes that have yet to train one of the models, and the run directory of each."""


def check(job: Job) -> Start:
    """Refuse whatever would fail later; nothing on disk is changed, no actor is started."""
    config, adapter = job.config, job.config.training.adapter
    scores = ["reward_model"] if config.reward.model is not None else []
    checks.check_machines(job.cluster, ("policy", "reward_model", "rollout"), local=job.local)
    checks.check_attention(config.model, job.cluster, ["policy", "rollout", *scores])
    if not job.local:
        checks.check_splitting(config.model, job.cluster, {"policy": adapter})
    if config.reference.follow == "round":
        refuse_split_adapter(job, adapter, "reference.follow")
    check_trackers(config.run.trackers)
    choose_engine(config.rollout.engine, job.cluster.rollout.engine)
    model, reward = checks.resolve_policy(config.model), checks.resolve_reward(config.reward, config.model)
    config = config.model_copy(update={"model": model, "reward": reward})
    tokenizer = load_tokenizer(model.path, model.revision)
    checks.check_stops(config.rollout, tokenizer)
    lengths = {**checks.answer_lengths(config), "its end token": 1}
    num_parameters = check_model("training", model, tokenizer, adapter, lengths=lengths)
    checks.check_reward_models(config)
    checks.check_rollout(config, job.cluster, adapter, local=job.local)
    prompts = load_prompts(config.data, tokenizer)
    # Dealing out the first round refuses one larger than the data.
    count, key = config.rounds.prompts_per_round, "rounds.prompts_per_round"
    prompts_for_step(prompts.train, 0, batch_size=count, seed=config.run.seed, key=key)
    checks.check_reward_functions(reward, [*prompts.train, *prompts.held_out])
    check_plain(prompts.train, read_columns(reward))
    read_labels(config.rounds.labels)
    first = checks.untrained(job.config)
    for recipe, folder in first.items():
        common.check_first(job, common.main_of(recipe), folder)
    return Start(config=config, tokenizer=tokenizer, prompts=prompts, num_parameters=num_parameters, first=first)


def read_labels(path: str | None) -> list[Row]:
    """What a person has said so far; nothing where the file is not there yet.

    Raises:
        ValueError: `file:line: reason` for a line that says nothing.
    """
    if path is None or not Path(path).expanduser().exists():
        return []
    rows = read_rows(SourceConfig(path=path))
    for row in rows:
        check_labelled(row.values, row.where)
    return rows


def run_iterative(job: Job) -> None:
    """The body of a recipe in rounds."""
    start = check(job)
    if job.dry_run:
        checks.check_start(job)
        known = replace(job, config=start.config)
        print(planning.iterative_plan(known, start.num_parameters, start.prompts.summary(), start.first.values()))
        return
    print(f"prompts: {start.prompts.summary()}", flush=True)
    print(f"rollout engine: {planning.engine_in_words(start.config, job.cluster)}", flush=True)
    moves = start.config.reference.follow == "round"
    space = learner_bytes(start.config, start.num_parameters, reference_moves=moves)
    directory, resume_from = common.open_run_directory(job, num_bytes=space)
    for recipe, folder in start.first.items():
        common.train_first(job, common.main_of(recipe), folder)
    if start.first:
        start = check(job)
    config = start.config
    read = inputs(config, [*start.prompts.train, *start.prompts.held_out])
    directory.keep_inputs(read)

    with job.groups(iterative_actors(config, job.cluster, model_path=config.model.path)) as groups:
        machines = job.cluster.rollout
        roles = iterative_roles(groups, weight_route=machines.weight_route, engine_limits=machines.engine_limits)
        run = common.make_run(directory, config.run, model_path=config.model.path)
        state = IterativeState()
        if resume_from:
            state = IterativeState(**common.restore(job, run, resume_from, {"policy": roles.policy}))
        improve(job, start, roles, run, state, read)
        run.close()


def improve(
    job: Job, start: Start, roles: IterativeRoles, run: Run, state: IterativeState, read: dict[str, str]
) -> None:
    """Answer the held-out prompts, train, answer them again, and write down what came of it."""
    config, prompts, directory = start.config, start.prompts, run.directory
    temperature = config.rollout.temperature
    begun = roles.policy.token_logprobs("start_logprobs", temperature=temperature) if config.knows_start else None

    def answer_held_out(rounds: int, max_unscorable: float | None = None) -> HeldOut:
        run.progress.message(f"answering {len(prompts.held_out)} held-out prompts after {rounds} rounds")
        roles.policy.send_weights(roles.rollout, version=rounds).result()
        return evaluate(
            prompts.held_out,
            policy=roles.policy.token_logprobs("logprobs", temperature=temperature),
            reference=begun,
            reward=roles.reward,
            rollout=roles.rollout,
            greedy=config.evaluation.greedy,
            version=rounds,
            max_unscorable=max_unscorable,
        )

    budget = config.reward.max_unscorable
    before = common.once(directory.path / "held_out_before.json", HeldOut, lambda: answer_held_out(0, budget))
    encoder = Encoder(
        tokenizer=start.tokenizer,
        eos_ids=eos_ids_of_model(start.tokenizer, config.model.path, config.model.revision),
        max_tokens=config.max_tokens,
        system_prompt=None,  # it stands in the conversations that were asked
    )
    through = train_in_rounds(
        config,
        prompts.train,
        policy=roles.policy,
        reward=roles.reward,
        rollout=roles.rollout,
        judge=lambda number, answered: judge(config, directory, number, answered),
        encode=lambda rows: encode_pairs(rows, encoder),
        columns=read_columns(config.reward),
        evaluate=answer_held_out,
        run=run,
        state=state,
    )
    if not through:
        return
    after = answer_held_out(config.num_rounds)
    after.save(directory.path / "held_out_after.json")
    if warning := unscored_warning(after, budget):  # what was learnt is kept: training is done
        run.progress.message(warning)
    roles.policy.export(directory.final).result()
    gains = compare(before, after, seed=config.run.seed)
    write_model_card(
        directory.final,
        recipe=job.name,
        base=job.config.model.path,
        config=dump_config(job.config),
        data=prompts.summary(),
        inputs=read,
        figures=gains,
        step=state.step,
    )
    kl = None if after.kl is None else {"value": after.kl, "limit": None}
    common.write_summary(job, directory, gains, kl=kl)
    if config.run.show_text:
        print(answer_table(before, after, num_shown=config.evaluation.num_shown))


def judge(
    config: IterativeRunConfig, directory: RunDirectory, number: int, answered: AnsweredBatch
) -> RankedRound | None:
    """The pairs of a round by its scores, or by a person; None, and what to do, where that person has yet to look."""
    if config.rounds.label_by == "reward":
        return rank_round(config, answered)
    ranking, labels = config.ranking, config.rounds.labels
    asked = asked_rows(
        rows_to_label(answered.answers, most=ranking.num_to_label, unsure_by=ranking.unsure_by, on_cut=ranking.on_cut),
        number,
    )
    told = [(row.where, row.values) for row in read_labels(labels) if row.values["round"] == number]
    if asked and not told:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in asked)
        directory.write_text_atomic(directory.path / "to_label.jsonl", text)
        print(
            f"round {number} waits: {len(asked)} pairs in {directory.path}/to_label.jsonl; set 'ranks' of each to "
            f"[1, 2] or [2, 1], 1 the better answer, remove what you cannot tell, add the lines to {labels}, and "
            "start the same command again",
            flush=True,
        )
        return None
    rows = labelled_pairs(told, asked)
    prompts = list(by_prompt(answered.answers).values())
    figures = {
        **score_figures(prompts, seed=config.run.seed),
        "asked": len(asked),
        "pairs": len(rows),
        "share_of_prompts_with_a_pair": len(rows) / len(prompts) if prompts else 0.0,
    }
    return RankedRound(rows=rows, figures={**figures, **answer_figures(answered)})

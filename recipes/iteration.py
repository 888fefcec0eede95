"""What recipes in rounds share: from a checked config to `final/`, with the held-out answers before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from actors.build import IterativeRoles, iterative_actors, iterative_roles
from actors.engines import choose_engine
from alignment.config import IterativeRunConfig
from alignment.config_io import dump_config
from alignment.data.chat import eos_ids_of_model, load_tokenizer
from alignment.data.preferences import encode_pairs
from alignment.data.prompts import PromptSet, load_prompts, prompts_for_step
from alignment.data.reading import Encoder
from alignment.loops.evaluation import HeldOut, answer_table, compare, evaluate, unscored_warning
from alignment.loops.iterative import IterativeState, RankedRound, open_rounds, rank_round, train_in_rounds
from alignment.loops.ranking import AnsweredBatch
from alignment.loops.run import Run
from alignment.metrics import check_trackers
from alignment.model_card import write_model_card
from alignment.model_checks import check_model
from alignment.run_directory import RunDirectory
from alignment.types import Prompt
from recipes import checks, common, planning
from recipes.asking import judge_by_person, read_labels, tell_unused
from recipes.preference_checks import refuse_split_adapter, refuse_unshared
from recipes.preference_tuning import learner_bytes
from recipes.ranking import check_plain, inputs, read_columns
from recipes.settling import shares_prompts

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
    if shares_prompts(config):
        refuse_unshared(model, adapter)
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
    read_labels(config)
    first = checks.untrained(job.config)
    for recipe, folder in first.items():
        common.check_first(job, common.main_of(recipe), folder)
    return Start(config=config, tokenizer=tokenizer, prompts=prompts, num_parameters=num_parameters, first=first)


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
    config, directory = start.config, run.directory
    done = open_rounds(config, directory, step=state.step)
    tell_unused(config, done.pairs)
    asker = HeldOutAsker(config, start.prompts.held_out, roles, run)
    before = common.once(
        directory.path / "held_out_before.json", HeldOut, lambda: asker.ask(0, config.reward.max_unscorable)
    )
    encoder = Encoder(
        tokenizer=start.tokenizer,
        eos_ids=eos_ids_of_model(start.tokenizer, config.model.path, config.model.revision),
        max_tokens=config.max_tokens,
        system_prompt=None,  # it stands in the conversations that were asked
    )
    all_rounds_learnt = train_in_rounds(
        config,
        start.prompts.train,
        policy=roles.policy,
        reward=roles.reward,
        rollout=roles.rollout,
        judge=lambda number, answered: judge(config, directory, number, answered),
        encode=lambda rows: encode_pairs(rows, encoder),
        columns=read_columns(config.reward),
        evaluate=asker.ask,
        run=run,
        state=state,
        done=done,
    )
    if all_rounds_learnt:
        finish(job, start, asker, before, state, read)


@dataclass(frozen=True, slots=True)
class HeldOutAsker:
    """Has the held-out prompts answered by the policy as it is."""

    config: IterativeRunConfig
    prompts: Sequence[Prompt]
    roles: IterativeRoles
    run: Run

    def ask(self, rounds: int, max_unscorable: float | None = None) -> HeldOut:
        """The answers after so many rounds, their scores, and where the first model is known how far they are from it.

        `max_unscorable`: as for `evaluate`."""
        config, policy, temperature = self.config, self.roles.policy, self.config.rollout.temperature
        self.run.progress.message(f"answering {len(self.prompts)} held-out prompts after {rounds} rounds")
        policy.send_weights(self.roles.rollout, version=rounds).result()
        return evaluate(
            self.prompts,
            policy=policy.token_logprobs("logprobs", temperature=temperature),
            reference=policy.token_logprobs("start_logprobs", temperature=temperature) if config.knows_start else None,
            reward=self.roles.reward,
            rollout=self.roles.rollout,
            greedy=config.evaluation.greedy,
            version=rounds,
            max_unscorable=max_unscorable,
        )


def finish(
    job: Job, start: Start, asker: HeldOutAsker, before: HeldOut, state: IterativeState, read: dict[str, str]
) -> None:
    """Answer the held-out prompts again, and leave model, card and summary."""
    config, directory = asker.config, asker.run.directory
    after = asker.ask(config.num_rounds)
    after.save(directory.path / "held_out_after.json")
    if warning := unscored_warning(after, config.reward.max_unscorable):  # what was learnt is kept: training is done
        asker.run.progress.message(warning)
    asker.roles.policy.export(directory.final).result()
    gains = compare(before, after, seed=config.run.seed)
    write_model_card(
        directory.final,
        recipe=job.name,
        base=job.config.model.path,
        config=dump_config(job.config),
        data=start.prompts.summary(),
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
    """The pairs of a round by its scores, or by a person; None where that person has yet to look."""
    if config.rounds.label_by == "reward":
        return rank_round(config, answered)
    return judge_by_person(config, directory.path, number, answered)

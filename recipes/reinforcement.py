"""What the PPO recipes share: from a checked config to `final/`, with the held-out answers before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from actors.build import PpoRoles, ppo_actors, ppo_roles
from actors.engines import choose_engine
from actors.plan import checkpoint_bytes
from alignment.config import ROLES, PpoRunConfig
from alignment.data.chat import eos_ids_of_model, eos_is_trained, load_tokenizer
from alignment.data.prompts import PromptSet, load_prompts, prompts_for_step
from alignment.fingerprint import model_fingerprint, records_fingerprint
from alignment.loops.evaluation import HeldOut, answer_table, compare, evaluate, unscored_warning
from alignment.loops.hacking_report import write_hacking_report
from alignment.loops.ppo import PpoState, stop_on_blow_up, train_ppo, train_ppo_one_pass
from alignment.loops.run import Run
from alignment.metrics import check_trackers
from recipes import checks, common, planning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """What the run begins with, all of it checked."""

    config: PpoRunConfig
    """With the path of every model as transformers takes it."""
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptSet
    num_parameters: int
    first: Mapping[str, Path]
    """Recipes that have yet to train one of the models, and the run directory of each."""


def check(job: common.Job[PpoRunConfig]) -> Start:
    """Refuse whatever would fail later; nothing on disk is changed, no actor is started."""
    hosts = [role for role in ROLES if role != "reward_model" or job.config.reward.model is not None]
    checks.check_machines(job.cluster, ROLES, local=job.local)
    checks.check_attention(job.config.model, job.cluster, hosts)
    if not job.local:
        policy, critic = job.config.policy.adapter, job.config.critic.adapter
        checks.check_splitting(
            job.config.model, job.cluster, {"policy": policy, "reference": policy, "critic": critic}
        )
    check_trackers(job.config.run.trackers)
    choose_engine(job.config.rollout.engine, job.cluster.rollout.engine)
    config = checks.resolve_paths(job.config)
    tokenizer = load_tokenizer(config.model.path, config.model.revision)
    num_parameters = checks.check_models(config, tokenizer)
    checks.check_rollout(config, job.cluster, config.policy.adapter, local=job.local)
    prompts = load_prompts(config.data, tokenizer)
    # Dealing out the first step refuses a batch larger than the data.
    prompts_for_step(prompts.train, 0, batch_size=config.ppo.rollout_batch_size, seed=config.run.seed)
    checks.check_reward_functions(config.reward, [*prompts.train, *prompts.held_out])
    first = checks.untrained(job.config)
    for recipe, folder in first.items():
        common.check_first(job, common.main_of(recipe), folder)
    return Start(config=config, tokenizer=tokenizer, prompts=prompts, num_parameters=num_parameters, first=first)


def inputs(config: PpoRunConfig, prompts: PromptSet) -> dict[str, str]:
    """A short name for the contents of all that the run reads."""
    scoring = {f"reward model{f' {k}' if k else ''}": path for k, path in enumerate(config.reward.models)}
    models = {"model": config.model.path, "critic": config.critic.path, **scoring}
    return {
        **{name: model_fingerprint(path, config.model.revision) for name, path in models.items() if path is not None},
        "prompts": records_fingerprint([*prompts.train, *prompts.held_out]),
    }


def run_ppo(job: common.Job[PpoRunConfig]) -> None:
    """The body of a PPO recipe."""
    start = check(job)
    if job.dry_run:
        checks.check_start(job)
        known = replace(job, config=start.config)
        print(planning.ppo_plan(known, start.num_parameters, start.prompts.summary(), start.first.values()))
        return
    print(f"prompts: {start.prompts.summary()}", flush=True)
    print(f"rollout engine: {planning.engine_in_words(start.config, job.cluster)}", flush=True)
    space = checkpoint_bytes(start.config, start.num_parameters)
    directory, resume_from = common.open_run_directory(job, num_bytes=space)
    for recipe, folder in start.first.items():
        common.train_first(job, common.main_of(recipe), folder)
    if start.first:
        start = check(job)
    config, model = start.config, start.config.model
    directory.keep_inputs(inputs(config, start.prompts))

    actors = ppo_actors(config, job.cluster, model_path=model.path, critic_path=config.critic.path or model.path)
    with job.groups(actors) as groups:
        machines = job.cluster.rollout
        roles = ppo_roles(groups, weight_route=machines.weight_route, engine_limits=machines.engine_limits)
        ends = eos_ids_of_model(start.tokenizer, model.path, model.revision)
        trained = eos_is_trained(start.tokenizer, eos_ids=ends)
        run = common.make_run(directory, config.run, model_path=model.path, eos_is_trained=trained)
        state = PpoState.start(config)
        if resume_from:
            parts = {"policy": roles.policy, "critic": roles.critic}
            state.load_state_dict(common.restore(job, run, resume_from, parts))
        if resume_from or config.policy.adapter.quantization != "none":
            # The engines have loaded the base model: neither what was trained, nor what rounding made of it.
            roles.policy.send_weights(roles.rollout, version=state.step).result()
        improve(job, config, start.prompts, roles, run, state)
        run.close()


def improve(
    job: common.Job[PpoRunConfig],
    config: PpoRunConfig,
    prompts: PromptSet,
    roles: PpoRoles,
    run: Run,
    state: PpoState,
) -> None:
    """Answer the held-out prompts, train, answer them again, and write down what came of it."""

    def answer_held_out(max_unscorable: float | None = None) -> HeldOut:
        run.progress.message(f"answering {len(prompts.held_out)} held-out prompts with policy {state.step}")
        return evaluate(
            prompts.held_out,
            policy=roles.policy,
            reference=roles.reference,
            reward=roles.reward,
            rollout=roles.rollout,
            greedy=config.evaluation.greedy,
            version=state.step,
            max_unscorable=max_unscorable,
        )

    directory, budget = run.directory, config.reward.max_unscorable
    before = common.once(directory.path / "held_out_before.json", HeldOut, lambda: answer_held_out(budget))
    train = train_ppo_one_pass if config.ppo.one_pass else train_ppo
    try:
        train(
            config,
            prompts.train,
            policy=roles.policy,
            critic=roles.critic,
            reference=roles.reference,
            reward=roles.reward,
            rollout=roles.rollout,
            run=run,
            state=state,
        )
    finally:  # a run that was stopped is the one to be looked at
        gold = [function.key for function in config.reward.gold]
        write_hacking_report(directory, gold, window=config.hacking.window)
    after = answer_held_out()
    after.save(directory.path / "held_out_after.json")
    if warning := unscored_warning(after, budget):  # what was learnt is kept: training is done
        run.progress.message(warning)
    roles.policy.export(directory.final).result()
    gains = compare(before, after, seed=config.run.seed)
    kl = {"value": after.kl, "limit": config.kl.limit}
    common.write_summary(job, directory, gains, kl=kl, hacking=state.hacking.summary())
    if config.run.show_text:
        print(answer_table(before, after, num_shown=config.evaluation.num_shown))
    stop_on_blow_up(after.kl, config.kl.limit, state.step)

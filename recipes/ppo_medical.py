"""PPO on a medical assistant, four models and a sampler as Ray actors: `python recipes/ppo_medical.py`.

Consumer health questions in, better answers out: the policy learns from a reward model (trained first by
`recipes/reward_model_medical.py` when it is not there yet) and from rule rewards, tied to the reference by a KL
penalty. `--local` runs the same in one process.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from actors.build import ppo_actors, ppo_roles
from alignment.config import ROLES, PpoRunConfig
from alignment.data.chat import eos_ids_of_model, eos_is_trained, load_tokenizer
from alignment.data.prompts import load_prompts, prompts_for_step
from alignment.loops.evaluation import HeldOut, answer_table, compare, evaluate
from alignment.loops.ppo import PpoState, train_ppo, train_ppo_one_pass
from alignment.loops.run import Run
from alignment.metrics import check_trackers
from recipes import checks, common, reward_model_medical


def run_ppo(job: common.Job[PpoRunConfig]) -> None:
    config = checks.resolve_paths(job.config)
    model_path = config.model.path
    tokenizer = load_tokenizer(model_path, config.model.revision)
    num_parameters = checks.check_models(config, tokenizer)
    prompts = load_prompts(config.data, tokenizer)
    # Dealing out the first step refuses a batch larger than the data.
    prompts_for_step(prompts.train, 0, batch_size=config.ppo.rollout_batch_size, seed=config.run.seed)
    checks.check_machines(job.cluster, ROLES, local=job.local)
    checks.check_reward_functions(config.reward)
    check_trackers(config.run.trackers)
    if job.dry_run:
        checks.check_start(job)
        print(common.ppo_plan(job, num_parameters, len(prompts.train), len(prompts.held_out)))
        return
    directory, resume_from = common.open_run_directory(job)
    if config.reward.model is not None and checks.is_own_reward_model(config.reward.model):
        common.train_first(job, reward_model_medical.main, Path(config.reward.model).parent)

    actors = ppo_actors(config, job.cluster, model_path=model_path, critic_path=config.critic.path or model_path)
    with job.groups(actors) as groups:
        roles = ppo_roles(groups, weight_route=job.cluster.rollout.weight_route)
        trained = eos_is_trained(tokenizer, eos_ids=eos_ids_of_model(tokenizer, model_path, config.model.revision))
        run = common.make_run(Run, directory, config.run, model_path=model_path, eos_is_trained=trained)
        state = PpoState.start(config)
        if resume_from:
            parts = {"policy": roles.policy, "critic": roles.critic}
            state.load_state_dict(common.restore(job, run, resume_from, parts))
            roles.policy.send_weights(roles.rollout, version=state.step).result()

        def answer_held_out() -> HeldOut:
            run.progress.message(f"answering {len(prompts.held_out)} held-out prompts with policy {state.step}")
            return evaluate(
                prompts.held_out,
                policy=roles.policy,
                reference=roles.reference,
                reward=roles.reward,
                rollout=roles.rollout,
                greedy=config.evaluation.greedy,
                moved=state.step > 0,
            )

        before = common.once(directory.path / "held_out_before.json", HeldOut, answer_held_out)
        train = train_ppo_one_pass if config.ppo.one_pass else train_ppo
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
        after = answer_held_out()
        after.save(directory.path / "held_out_after.json")
        roles.policy.export(directory.final).result()
        common.write_summary(
            job,
            directory,
            compare(before, after, seed=config.run.seed),
            kl={"value": after.kl, "limit": config.kl.limit},
        )
        if config.run.show_text:
            print(answer_table(before, after, num_shown=config.evaluation.num_shown))
        run.close()


def main(argv: list[str] | None = None) -> int:
    return common.run_recipe("ppo_medical", PpoRunConfig, run_ppo, argv)


if __name__ == "__main__":
    sys.exit(main())

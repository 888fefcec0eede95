"""The body of a run on live choices: from a checked config to `final/`, with people asked before and after."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from actors.build import dpo_actors, preference_role
from actors.handles import PreferenceHandle
from actors.plan import learner_checkpoint_bytes
from alignment.checkpoint import load_json
from alignment.config import LiveRunConfig
from alignment.config_io import dump_config
from alignment.data.feedback_pairs import FeedbackPairs
from alignment.data.model_assets import resolve_model
from alignment.data.movielens import prompt_of
from alignment.data.movielens_live import live_choices
from alignment.feedback_log import FeedbackConsumer, FeedbackEvent
from alignment.fingerprint import model_fingerprint
from alignment.loops.online_feedback import FeedbackState, learn_from_feedback
from alignment.loops.run import Run
from alignment.model_card import write_model_card
from alignment.types import PreferencePair
from recipes import checks, common, planning
from recipes.film_models import base_scores, ranking_of, refuse_late_data
from recipes.film_ranking import FilmRanking, film_table, methods_table, some_of
from recipes.live_sources import LOG_NAME, Sources, check_sources
from recipes.preference_checks import make_first, refuse_unshared
from recipes.settling import shares_prompts

Job = common.Job[LiveRunConfig]


class LivePairs:
    """The pairs of a choice, as many as a step takes: a pure function of the choice."""

    def __init__(self, pairs: FeedbackPairs, *, most: int, max_tokens: int) -> None:
        self._pairs, self._most, self._max_tokens = pairs, most, max_tokens

    def __call__(self, event: FeedbackEvent) -> list[PreferencePair]:
        made = self._pairs.pairs(event)
        return [made[i] for i in some_of(len(made), self._most, event.id)]

    def check(self, event: FeedbackEvent) -> None:
        """Refuse what no pair can be made of.

        Raises:
            ValueError: naming the field, not what it holds.
        """
        self._pairs.check(event)
        longest = max(len(ids) for pair in self._pairs.pairs(event) for ids in pair.sequences)
        if longest > self._max_tokens:
            raise ValueError(
                f"liked, shown: got {longest} tokens of prompt and title, expected at most {self._max_tokens}; name "
                "less, or raise data.max_tokens"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """What the run begins with, all of it checked."""

    job: Job
    model: checks.Trainee
    base_path: str
    ranking: FilmRanking
    replayed: Sequence[FeedbackEvent]
    pairs: LivePairs

    @property
    def inputs(self) -> dict[str, str]:
        """Fingerprints of what the run reads, by name."""
        return {
            "model": model_fingerprint(self.model.path, self.job.config.model.revision),
            "base": model_fingerprint(self.base_path),
            **self.ranking.inputs,
        }

    @property
    def num_steps(self) -> int:
        """Of a run whose replay is its only source as many as that has full batches."""
        config = self.job.config
        if config.live.port is not None or config.live.file is not None:
            return config.run.num_steps
        return min(config.run.num_steps, len(self.replayed) // config.training.choices_per_step)

    def in_words(self) -> str:
        live = self.job.config.live
        from_where = [
            *([f"{len(self.replayed)} choices that are replayed"] if live.replay else []),
            *(["HTTP"] if live.port is not None else []),
            *([live.file] if live.file is not None else []),
        ]
        return f"choices: from {', '.join(from_where)}\n{self.ranking.in_words()}"


def run_live(job: Job) -> None:
    """The body of `live_recommender`."""
    if not make_first(job, [job.config.model.path]):
        return
    start = check(job)
    config = job.config
    if job.dry_run:
        checks.check_start(job)
        print(planning.preference_plan(job, start.model.num_parameters, start.in_words(), row="pair", sequences=2))
        return
    print(start.in_words(), flush=True)
    space = learner_checkpoint_bytes(config.model, config.training.adapter, config.run, start.model.num_parameters)
    directory, resume_from = common.open_run_directory(job, num_bytes=space)
    inputs = start.inputs
    directory.keep_inputs(inputs)
    run = common.make_run(
        directory, config.run.model_copy(update={"num_steps": start.num_steps}), model_path=start.model.path
    )
    size, seconds = config.training.choices_per_step, config.live.poll_seconds
    consumer = FeedbackConsumer(directory.path / LOG_NAME, batch_size=size, poll_seconds=seconds)
    with contextlib.ExitStack() as stack:
        stack.callback(run.close)
        stack.callback(consumer.close)
        known = load_json(resume_from / "loop.json") if resume_from else asdict(FeedbackState())
        consumer.seek(known["next_event"], after=known["last_id"])
        sources = stack.enter_context(
            Sources(config.live, directory.path, consumer=consumer, replayed=start.replayed, check=start.pairs.check)
        )
        base = base_scores(job, start.ranking, start.base_path, run)
        groups = stack.enter_context(job.groups(dpo_actors(config, job.cluster, model_path=start.model.path)))
        policy = preference_role(groups)
        state = FeedbackState()
        if resume_from:
            state = FeedbackState(**common.restore(job, run, resume_from, {"policy": policy}))
        before = start.ranking.kept_scores(
            policy.ref_candidate_logps, run.progress.message, what="before", model=inputs["model"]
        )
        learn_from_feedback(consumer, start.pairs, policy=policy, run=run, state=state)
        sources.require_sound()
        finish(start, policy, run, state, scores=(base, before), inputs=inputs, num_events=len(sources.log))


def check(job: Job) -> Start:
    """Refuse whatever would fail later; nothing on disk is changed, no actor is started."""
    config = job.config
    model = checks.check_trainee(job, "policy")
    if shares_prompts(config):
        refuse_unshared(config.model.at(model.path, config.model.revision), config.training.adapter)
    checks.check_answering(job)
    check_sources(config.live, job.output_dir)
    refuse_late_data(config.model.path, config.films)
    base_path = resolve_model(config.base, None)
    data = film_table(config.films)
    events, last = live_choices(data, per_user=config.films.choices_per_person)
    size = config.training.choices_per_step
    if config.live.replay and size > len(events):
        raise ValueError(
            f"training.choices_per_step: got {size}, expected at most the {len(events)} choices that are replayed; "
            "lower it"
        )
    ranking = ranking_of(config, data, model, base=base_path, after=last)
    pairs = FeedbackPairs(
        model.tokenizer,
        title=data.title,
        liked=data.shown_titles,
        prompt=prompt_of,
        system_prompt=config.data.system_prompt,
        eos_ids=model.eos_ids,
    )
    live_pairs = LivePairs(pairs, most=config.training.pairs_per_choice, max_tokens=config.data.max_tokens)
    for event in events if config.live.replay else ():
        live_pairs.check(event)
    return Start(
        job=job,
        model=model,
        base_path=base_path,
        ranking=ranking,
        replayed=events if config.live.replay else [],
        pairs=live_pairs,
    )


def finish(
    start: Start,
    policy: PreferenceHandle,
    run: Run,
    state: FeedbackState,
    *,
    scores: tuple[list[list[float]], list[list[float]]],
    inputs: dict[str, str],
    num_events: int,
) -> None:
    """Ask people again, and leave model, card and summary. `scores`: of the base, and before."""
    ranking, job, directory = start.ranking, start.job, run.directory
    base, before = scores
    after = ranking.scores(policy.candidate_logps, run.progress.message, what="after")
    ranking.save(directory.path / "films.json", base=base, before=before, after=after)
    films = ranking.beside(
        {
            "before, implicit reward": ranking.implicit(before, base),
            "before, log-probability": before,
            "after, implicit reward": ranking.implicit(after, base),
            "after, log-probability": after,
        }
    )
    print(methods_table(films))
    figures = ranking.table(before, after, base)
    feedback = {
        "learnt": state.next_event - state.num_skipped,
        "skipped": state.num_skipped,
        "pairs": state.num_pairs,
        "waiting": num_events - state.next_event,
    }
    print(
        f"choices: {feedback['learnt']} learnt in {state.step} steps, {feedback['skipped']} skipped as not finite, "
        f"{feedback['waiting']} wait for a full one"
    )
    policy.export(directory.final).result()
    write_model_card(
        directory.final,
        recipe=job.name,
        base=job.config.model.path,
        config=dump_config(job.config),
        data=f"{feedback['learnt']} choices, {state.num_pairs} pairs",
        inputs=inputs,
        figures=figures,
        step=state.step,
    )
    parameters = policy.num_parameters().result()
    common.write_summary(job, directory, figures, parameters=parameters, films=films, feedback=feedback)

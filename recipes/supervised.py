"""What the supervised recipes share: from a checked config to `final/`, with the held-out figures before and after."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from actors.build import sft_actors, sft_role
from actors.handles import SftHandle
from actors.plan import learner_checkpoint_bytes
from alignment.config import SftRunConfig
from alignment.config_io import dump_config
from alignment.data.sft import SftData, load_sft_data
from alignment.fingerprint import model_fingerprint
from alignment.loops.offline import SftState, loss_report, take_best, train_sft
from alignment.loops.quiz import Question, Quiz, quiz_report
from alignment.model_card import write_model_card
from recipes import checks, common, planning

Ask = Callable[[Any, str | None], Quiz]
"""Questions from a tokenizer and a system prompt: what a finished model should answer right."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut(common.PlainRecord):
    """What a model makes of the held-out examples and questions."""

    sums: list[float]
    """Negative log-likelihood of each example, summed over its trained tokens."""
    answers: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """What the run begins with, all of it checked."""

    model_path: str
    data: SftData
    quiz: Quiz
    num_parameters: int


def check(job: common.Job[SftRunConfig], ask: Ask | None = None) -> Start:
    """Refuse whatever would fail later; nothing on disk is changed, no actor is started."""
    config = job.config
    model = checks.check_trainee(job, "policy", read_singly=config.training.calibration_examples > 0)
    data = load_sft_data(config.data, model.tokenizer, eos_ids=model.eos_ids, seed=config.run.seed)
    if config.data.held_out and not data.held_out:
        raise ValueError(
            f"data.held_out: got {config.data.held_out}, of which data.on_long and data.max_tokens leave none, "
            "expected examples to validate on; raise data.max_tokens, or set data.held_out to 0"
        )
    if config.training.calibration_examples > data.num_examples:
        raise ValueError(
            f"training.calibration_examples: got {config.training.calibration_examples}, expected at most the "
            f"{data.num_examples} training examples; lower it"
        )
    quiz = Quiz() if ask is None else ask(model.tokenizer, config.data.system_prompt)
    if quiz.questions:
        checks.check_answering(job)
    return Start(model_path=model.path, data=data, quiz=quiz, num_parameters=model.num_parameters)


def run_sft(job: common.Job[SftRunConfig], ask: Ask | None = None) -> None:
    """The body of a supervised recipe. `ask`: questions to answer before and after, beside the held-out loss."""
    config, start = job.config, check(job, ask)
    if job.dry_run:
        checks.check_start(job)
        print(planning.sft_plan(job, start.num_parameters, start.data.summary()))
        return
    print(f"examples: {start.data.summary()}", flush=True)
    space = learner_checkpoint_bytes(config.model, config.training.adapter, config.run, start.num_parameters)
    directory, resume_from = common.open_run_directory(job, num_bytes=space)
    model = model_fingerprint(start.model_path, config.model.revision)
    inputs = {"model": model, "examples": start.data.fingerprint()}
    directory.keep_inputs(inputs)

    calibration = start.data.batch(0, config.training.calibration_examples)
    actors = sft_actors(config, job.cluster, model_path=start.model_path, calibration=calibration)
    with job.groups(actors) as groups:
        policy = sft_role(groups)
        run = common.make_run(directory, config.run, model_path=start.model_path)
        state = SftState()
        if resume_from:
            state = SftState(**common.restore(job, run, resume_from, {"policy": policy}))
        before = common.once(directory.path / "held_out_before.json", HeldOut, lambda: _held_out(start, policy))
        patience = config.training.patience or math.inf
        train_sft(config, start.data, policy=policy, run=run, state=state, patience=patience)
        step = take_best(policy, run, state)
        after = _held_out(start, policy)
        after.save(directory.path / "held_out_after.json")
        policy.export(directory.final).result()
        figures = compare(before, after, start, seed=config.run.seed)
        write_model_card(
            directory.final,
            recipe=job.name,
            base=config.model.path,
            config=dump_config(config),
            data=start.data.summary(),
            inputs=inputs,
            figures=figures,
            step=step,
            chosen=config.training.validate_every > 0,
        )
        common.write_summary(job, directory, figures, parameters=policy.num_parameters().result())
        run.close()


def _held_out(start: Start, policy: SftHandle) -> HeldOut:
    sums = policy.nll(start.data.held_out).result() if start.data.held_out else []
    quiz = start.quiz
    said = policy.respond(quiz.prompts, max_new_tokens=quiz.max_new_tokens).result() if quiz.questions else []
    return HeldOut(sums=sums, answers=[rollout.response for rollout in said])


def compare(before: HeldOut, after: HeldOut, start: Start, *, seed: int) -> dict[str, Any]:
    """The rows of the held-out table."""
    rows = {}
    if start.data.held_out:
        rows["loss"] = loss_report(before.sums, after.sums, start.data.held_out, seed)
    if start.quiz.questions:
        first, last = (quiz_report(start.quiz, held_out.answers) for held_out in (before, after))
        rows[start.quiz.name] = {
            **common.compare_items(first, last, seed),
            "majority_floor": start.quiz.majority_floor,
        }
    return rows


def questions_for(
    tokenizer: Any, system_prompt: str | None, rows: Sequence[Any], *, name: str, majority_floor: float
) -> Quiz:
    """A quiz of records with `prompt` and `answer`, rendered as the training examples are."""
    from alignment.data.prompts import make_prompt

    first = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    questions = [
        Question(prompt=make_prompt(tokenizer, [*first, {"role": "user", "content": row.prompt}]), answer=row.answer)
        for row in rows
    ]
    return Quiz(questions=questions, name=name, majority_floor=majority_floor)

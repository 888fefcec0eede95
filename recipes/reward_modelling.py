"""What the reward-model recipes share: from a checked config to `final/`, with the report of what it is worth."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from actors.build import reward_training_actors, reward_training_role
from actors.handles import RewardTrainingHandle
from actors.plan import learner_checkpoint_bytes
from actors.reward_training import objectives_of, write_statistics
from alignment.config import RewardModelRunConfig
from alignment.config_io import dump_config
from alignment.data.chat import decode
from alignment.data.judgements import JudgementSet, load_judgements
from alignment.fingerprint import model_fingerprint, records_fingerprint
from alignment.judgements import Judgement
from alignment.loops.offline import SftState, take_best, train_reward_model
from alignment.loops.reward_report import prompts_of, record_report, render, reward_report
from alignment.model_card import write_model_card
from alignment.run_directory import RunDirectory
from recipes import checks, common, planning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_STANDARD = 64
"""Training rows whose scores set the scale when none is held out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutScores(common.PlainRecord):
    """What a model makes of the held-out rows."""

    scores: list[list[float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """What the run begins with, all of it checked."""

    model_path: str
    tokenizer: PreTrainedTokenizerBase
    data: JudgementSet
    num_parameters: int


def check(job: common.Job[RewardModelRunConfig]) -> Start:
    """Refuse whatever would fail later; nothing on disk is changed, no actor is started."""
    config = job.config
    model = checks.check_trainee(job, "reward_model", head="random")
    data = load_judgements(config.data, model.tokenizer, eos_ids=model.eos_ids)
    objectives_of(config.training).check([*data.train, *data.held_out])
    return Start(model_path=model.path, tokenizer=model.tokenizer, data=data, num_parameters=model.num_parameters)


def run_reward_model(job: common.Job[RewardModelRunConfig]) -> None:
    """The body of a reward-model recipe."""
    config, start = job.config, check(job)
    data = start.data
    if job.dry_run:
        checks.check_start(job)
        print(planning.reward_model_plan(job, start.num_parameters, data.summary()))
        return
    print(data.summary(), flush=True)
    space = learner_checkpoint_bytes(config.model, config.training.adapter, config.run, start.num_parameters)
    directory, resume_from = common.open_run_directory(job, num_bytes=space)
    inputs = {
        "model": model_fingerprint(start.model_path, config.model.revision),
        data.kind: records_fingerprint([*data.train, *data.held_out]),
    }
    directory.keep_inputs(inputs)

    actors = reward_training_actors(config, job.cluster, model_path=start.model_path)
    with job.groups(actors) as groups:
        role = reward_training_role(groups)
        run = common.make_run(directory, config.run, model_path=start.model_path)
        state = SftState()
        if resume_from:
            state = SftState(**common.restore(job, run, resume_from, {"reward_model": role}))
        before = common.once(
            directory.path / "held_out_before.json", HeldOutScores, lambda: _scores(role, data.held_out)
        )
        train_reward_model(
            config,
            data,
            reward_model=role,
            run=run,
            state=state,
            objectives=objectives_of(config.training),
            patience=config.training.patience or math.inf,
        )
        step = take_best(role, run, state, part="reward_model")
        after = _scores(role, data.held_out)
        role.export(directory.final).result()
        figures = compare(before, after, data, seed=config.run.seed)
        if data.held_out:
            _write_report(directory, start, after, step=step, seed=config.run.seed)
        write_model_card(
            directory.final,
            recipe=job.name,
            base=config.model.path,
            config=dump_config(config),
            data=data.summary(),
            inputs=inputs,
            figures=figures,
            step=step,
            chosen=config.training.validate_every > 0,
        )
        # Standardised on real answers of all kinds, so that a score of 1 means one deviation better than these.
        known = after if data.held_out else _scores(role, data.train[:NUM_STANDARD])
        write_statistics(directory.final, [score for row in known.scores for score in row])
        common.write_summary(job, directory, figures)
        run.close()


def _scores(role: RewardTrainingHandle, records: Sequence[Judgement]) -> HeldOutScores:
    return HeldOutScores(scores=[list(row) for row in role.scores(records).result()] if records else [])


def compare(before: HeldOutScores, after: HeldOutScores, data: JudgementSet, *, seed: int) -> dict[str, Any]:
    """The rows of the held-out table; none when nothing is held out."""
    if not data.held_out:
        return {}
    first, last = (record_report(data.held_out, own.scores, seed=seed) for own in (before, after))
    return {"accuracy": common.compare_items(first, last, seed, groups=prompts_of(data.held_out))}


def _write_report(directory: RunDirectory, start: Start, after: HeldOutScores, *, step: int, seed: int) -> None:
    """`report.json` and `report.md`, private as all of the directory, and without any text on the screen."""
    report = reward_report(
        start.data.train,
        start.data.held_out,
        after.scores,
        step=step,
        seed=seed,
        decode=partial(decode, start.tokenizer),
    )
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    directory.write_text_atomic(directory.path / "report.json", text)
    directory.write_text_atomic(directory.path / "report.md", render(report, texts=True))
    print(render(report, texts=False), flush=True)

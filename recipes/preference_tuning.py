"""What the recipes on pairs and labels share: from a checked config to `final/`, with the held-out table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from actors.build import dpo_actors, kto_actors, preference_role
from actors.handles import PreferenceHandle
from actors.plan import learner_checkpoint_bytes
from actors.preference_training import objective_of
from alignment.config import DpoRunConfig, IterativeRunConfig, KtoRunConfig
from alignment.config_io import dump_config
from alignment.data.cache import cache_dir
from alignment.data.hygiene import label_hygiene, pair_hygiene
from alignment.data.tasks import Tasks, load_label_tasks, load_pair_tasks
from alignment.fingerprint import model_fingerprint, records_fingerprint
from alignment.loops.evaluation import HeldOut
from alignment.loops.offline import SftState, take_best
from alignment.loops.preference_stages import Judged, LabelStage, PairStage, Stage
from alignment.loops.preferences import AskReference, logps_of, of_parts, train_preferences
from alignment.loops.run import Run
from alignment.model_card import write_model_card
from alignment.reference_cache import cached_numbers
from recipes import checks, common, planning
from recipes.preference_checks import balance, check_preferences, make_first, refuse_long_mismatched
from recipes.rule_evaluation import RuleEvaluation

Job = common.Job[Any]
Config = DpoRunConfig | KtoRunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutNumbers(common.PlainRecord):
    """What policy and reference say of the held-out rows, by part; see `Judged`."""

    logps: list[Any]
    reference: list[Any]

    def judged(self) -> Judged:
        return Judged(logps=self.logps, reference=self.reference)


class OwnEvaluation(Protocol):
    """What a recipe asks of its policy before and after, beside the rows and prompts that are held out."""

    @property
    def inputs(self) -> Mapping[str, str]:
        """Fingerprints of what it reads, by name."""
        ...

    def in_words(self) -> str:
        """A line for the plan and for the start."""
        ...

    def prepare(self, run: Run) -> None:
        """Ask other models, before the run's own actors take their place on the machines."""
        ...

    def before(self, policy: PreferenceHandle, run: Run, *, model: str) -> None:
        """Ask the reference, while it is what the run begins with; a start that is not the first asks again.

        `model`: its fingerprint."""
        ...

    def after(self, policy: PreferenceHandle, run: Run) -> dict[str, dict[str, Any]]:
        """Ask the policy; returns rows of the held-out table."""
        ...

    def told(self) -> Mapping[str, Any]:
        """What else the summary says, by name."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """What the run begins with, all of it checked."""

    job: Job
    """With the weights of both classes that are used."""
    model_path: str
    num_parameters: int
    tasks: Tasks[Any]
    stage: Stage[Any]
    hygiene: str
    """What is odd about the data, without any text of it."""
    evaluation: RuleEvaluation
    own: OwnEvaluation | None = None

    @property
    def row(self) -> str:
        """What a record is called."""
        return "pair" if isinstance(self.job.config, DpoRunConfig) else "answer"

    @property
    def inputs(self) -> dict[str, str]:
        """Fingerprints of what the run reads, by name."""
        return {
            "model": model_fingerprint(self.model_path, self.job.config.model.revision),
            f"{self.row}s": records_fingerprint([*self.tasks.train, *self.tasks.held_out]),
            **(self.own.inputs if self.own else {}),
        }


def run_dpo(
    job: common.Job[Any], make_own: Callable[[common.Job[Any], checks.Trainee], OwnEvaluation] | None = None
) -> None:
    """The body of a recipe on pairs, of a `DpoRunConfig`.

    `make_own`: an evaluation of the recipe's own, which refuses what it cannot ask.
    """
    if not make_first(job, [job.config.model.path, *(source.path for source in job.config.data.sources)]):
        return
    model, evaluation = check_preferences(job)
    config: DpoRunConfig = job.config
    own = None if make_own is None else make_own(job, model)
    stage = PairStage(objective_of(config.dpo))
    kept_out = {prompt.prompt_ids for prompt in evaluation.prompts}
    tasks = load_pair_tasks(
        config.data, model.tokenizer, eos_ids=model.eos_ids, seed=config.run.seed, kept_out=kept_out
    )
    hygiene = [f"{name}: {pair_hygiene(split.train).text()}" for name, split in tasks.splits.items()]
    _run(
        Start(
            job=job,
            model_path=model.path,
            num_parameters=model.num_parameters,
            tasks=tasks,
            stage=stage,
            hygiene="\n".join(hygiene),
            evaluation=evaluation,
            own=own,
        )
    )


def run_kto(job: common.Job[KtoRunConfig]) -> None:
    """The body of a recipe on labels."""
    if not make_first(job, [job.config.model.path, *(source.path for source in job.config.data.sources)]):
        return
    model, evaluation = check_preferences(job)
    config = job.config
    kept_out = {prompt.prompt_ids for prompt in evaluation.prompts}
    tasks = load_label_tasks(
        config.data, model.tokenizer, eos_ids=model.eos_ids, seed=config.run.seed, kept_out=kept_out
    )
    if tasks.held_out and len({record.target for record in tasks.held_out}) < 2:
        raise ValueError(
            f"data.held_out: got {len(tasks.held_out)} answers of one class alone, expected both, to tell them apart; "
            "raise data.held_out, add answers of the other class, or set it to 0"
        )
    refuse_long_mismatched(config, model, tasks)
    balanced, warning = balance(config, tasks)
    kto = balanced.kto
    hygiene = [
        f"{name}: {dataclasses.replace(label_hygiene(split.train), advice=None).text()}"
        for name, split in tasks.splits.items()
    ]
    hygiene.append(f"weights: desirable {kto.desirable_weight:.4g}, undesirable {kto.undesirable_weight:.4g}")
    _run(
        Start(
            job=dataclasses.replace(job, config=balanced),
            model_path=model.path,
            num_parameters=model.num_parameters,
            tasks=tasks,
            stage=LabelStage(
                loss=kto.loss,
                beta=kto.beta,
                desirable_weight=kto.desirable_weight,
                undesirable_weight=kto.undesirable_weight,
            ),
            hygiene="\n".join([*hygiene, *([f"warning: {warning}"] if warning else [])]),
            evaluation=evaluation,
        )
    )


def _run(start: Start) -> None:
    job, tasks = start.job, start.tasks
    config: Config = job.config
    if job.dry_run:
        checks.check_start(job)
        sequences = 2 if start.row == "pair" else 1
        data = "\n".join([tasks.summary(), start.hygiene, *([start.own.in_words()] if start.own else [])])
        print(planning.preference_plan(job, start.num_parameters, data, row=start.row, sequences=sequences))
        return
    print(f"{tasks.summary()}\n{start.hygiene}", flush=True)
    moves = config.reference.sync_every is not None
    space = learner_bytes(config, start.num_parameters, reference_moves=moves)
    directory, resume_from = common.open_run_directory(job, num_bytes=space)
    directory.write_text_atomic(directory.path / "hygiene.txt", f"{tasks.summary()}\n{start.hygiene}\n")
    inputs = start.inputs
    directory.keep_inputs(inputs)

    run = common.make_run(directory, config.run, model_path=start.model_path)
    if start.own:
        start.own.prepare(run)
    with job.groups(actors_of(job, start.model_path)) as groups:
        policy = preference_role(groups)
        state = SftState()
        if resume_from:
            state = SftState(**common.restore(job, run, resume_from, {"policy": policy}))
        figures, step = improve(start, policy, run, state, model=inputs["model"])
        policy.export(directory.final).result()
        write_model_card(
            directory.final,
            recipe=job.name,
            base=config.model.path,
            config=dump_config(config),
            data=tasks.summary(),
            inputs=inputs,
            figures=figures,
            step=step,
            chosen=config.training.validate_every > 0,
        )
        more = start.own.told() if start.own else {}
        common.write_summary(job, directory, figures, parameters=policy.num_parameters().result(), **more)
        run.close()


def improve(
    start: Start, policy: PreferenceHandle, run: Run, state: SftState, *, model: str
) -> tuple[dict[str, Any], int]:
    """Judge the held-out rows, train, judge them again. Returns the rows of the held-out table, and which step's
    weights the policy has.

    `model`: the fingerprint of the model that the run begins with.
    """
    config, held_out, folder = start.job.config, start.tasks.held_out, run.directory.path
    if start.own:
        start.own.before(policy, run, model=model)
    reference = ask_reference(start, policy, run, model)
    before = common.once(folder / "held_out_before.json", HeldOutNumbers, lambda: judge(start, policy, reference))
    seed = config.run.seed
    said_before = common.once(
        folder / "answers_before.json", HeldOut, lambda: start.evaluation.answers(policy, seed=seed)
    )
    train_preferences(
        config,
        start.tasks,
        held_out,
        stage=start.stage,
        policy=policy,
        reference=reference,
        held_out_reference=before.reference,
        run=run,
        state=state,
        patience=config.training.patience or math.inf,
    )
    step = take_best(policy, run, state)
    after = dataclasses.replace(judge(start, policy, None), reference=before.reference)
    after.save(folder / "held_out_after.json")
    said_after = start.evaluation.answers(policy, seed=seed)
    said_after.save(folder / "answers_after.json")
    told = start.stage.table(held_out, before.judged(), after.judged(), seed=seed) if held_out else {}
    told |= start.evaluation.table(said_before, said_after, seed=seed)
    return told | (start.own.after(policy, run) if start.own else {}), step


def judge(start: Start, policy: PreferenceHandle, reference: AskReference | None) -> HeldOutNumbers:
    """What is said of the held-out rows now."""
    held_out = start.tasks.held_out
    if not held_out:
        return HeldOutNumbers(logps=[], reference=[])
    numbers = of_parts(start.stage.parts(held_out), reference) if reference else []
    return HeldOutNumbers(logps=logps_of(policy, start.stage, held_out), reference=numbers)


def actors_of(job: Job, model_path: str) -> Mapping[str, Any]:
    if isinstance(job.config, DpoRunConfig):
        return dpo_actors(job.config, job.cluster, model_path=model_path)
    return kto_actors(job.config, job.cluster, model_path=model_path)


def ask_reference(start: Start, policy: PreferenceHandle, run: Run, model: str) -> AskReference | None:
    """Who knows the reference's numbers: its actor at every step, or the cache, filled now; None where nobody asks.

    `model`: the fingerprint of what the reference is.
    """
    config = start.job.config

    def live(records: Sequence[Any]) -> list[Any]:
        return policy.ref_logps(records).result()

    if config.reference.mode != "cached":
        return live if config.reference.mode == "live" else None
    steps = range(config.run.num_steps)
    batches = (start.tasks.batch(step, config.training.batch_size) for step in steps)
    asked = [start.tasks.held_out, *batches] if start.tasks.held_out else batches
    records = [record for batch in asked for part in start.stage.parts(batch) for record in part]
    made_of = {
        "model": model,
        "kind": start.row,
        **{key: str(getattr(config.model, key)) for key in ("dtype", "attention", "batch_layout")},
        "quantization": config.training.adapter.quantization,
    }
    loss = config.dpo if isinstance(config, DpoRunConfig) else config.kto
    made_of["share_prompts"] = str(loss.share_prompts)
    if isinstance(config, DpoRunConfig):
        made_of["length_alpha"] = str(config.dpo.length_alpha)
    numbers, told = cached_numbers(cache_dir() / "reference", made_of, records, live)
    run.progress.message(told)
    policy.release_reference().result()
    return numbers


def learner_bytes(config: Config | IterativeRunConfig, num_parameters: int, *, reference_moves: bool) -> int:
    """What the run takes on disk; a reference that moves lies in every checkpoint of a policy trained in full."""
    space = learner_checkpoint_bytes(config.model, config.training.adapter, config.run, num_parameters)
    if not reference_moves or config.training.adapter.enabled:
        return space
    return space + (config.run.keep_checkpoints + 2) * num_parameters * (4 if config.model.dtype == "float32" else 2)

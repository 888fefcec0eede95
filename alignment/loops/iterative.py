"""Rounds: the policy answers, its answers are ranked, it learns from the pairs, and answers anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from alignment.config import IterativeRunConfig
from alignment.data.prompts import prompts_for_step
from alignment.interfaces import Generator, Pending, Scorer
from alignment.loops.evaluation import HeldOut
from alignment.loops.preferences import PreferenceTrainer
from alignment.loops.ranking import AnsweredBatch, AnswerLog, answer_batch, num_batches
from alignment.loops.run import Run, StepLog
from alignment.ranking import Row, ranked_pairs
from alignment.replay import replay_batch
from alignment.run_directory import RunDirectory
from alignment.types import PreferencePair, Prompt
from alignment.verified_lines import VerifiedLines


class RoundPolicy(PreferenceTrainer, Protocol):
    """A policy that learns from pairs, is sampled from, and is compared with what it was."""

    def ref_logps(self, records: Sequence[PreferencePair]) -> Pending[list[Any]]: ...
    def send_weights(self, rollout: Any, *, version: int) -> Pending[Any]: ...


@dataclass(kw_only=True)
class IterativeState:
    """What the loop itself remembers between steps."""

    step: int = 0
    """Completed steps, those of rounds that were skipped among them."""
    empty_in_a_row: int = 0
    """Rounds without a pair since the last one with some."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankedRound:
    """What came of the answers of a round."""

    rows: list[Row]
    """Pairs, as `alignment.ranking.pair_row` has them."""
    figures: dict[str, Any]


Judge = Callable[[int, AnsweredBatch], RankedRound | None]
"""From a round's number and its answers to its pairs; None where nobody has judged them yet."""


EMPTY = {
    "reward": (
        "answers with different scores",
        "raise ranking.num_samples_per_prompt or rollout.temperature, lower ranking.min_gap, or choose prompts that "
        "the policy answers right now and then",
    ),
    "person": (
        "pairs of which somebody can tell the better answer",
        "raise ranking.num_to_label or rollout.temperature, or set ranking.on_cut to keep",
    ),
}
"""What rounds without a pair lack, by who ranks their answers, and what may help."""


class RoundLog:
    """What the rounds have left on disk: answers, a batch a line, and pairs, a round a line."""

    def __init__(self, directory: RunDirectory, *, batches_per_round: int, current: int) -> None:
        """`current`: the round at which the run stands. Lines of later ones are dropped: the policy that answered
        then is yet to come.

        Raises:
            RuntimeError: answers of an earlier round are gone, or of this one, whose pairs are known. New ones would
                get their places.
        """
        self.batches_per_round = batches_per_round
        self._answers, self._pairs = AnswerLog(directory.batches), VerifiedLines(directory.pairs, "round")
        self._batches = self._answers.read((current + 1) * batches_per_round)
        self._rounds = [RankedRound(rows=r["pairs"], figures=r["figures"]) for r in self._pairs.read(current + 1)]
        for number in range(current + (current < len(self._rounds))):
            self._require_answers(number)

    @property
    def pairs(self) -> list[list[Row]]:
        """Those of each round that has been judged, from round 0."""
        return [ranked.rows for ranked in self._rounds]

    def missing(self, number: int) -> range:
        """Batches of round `number` that are yet to be answered, by their places in it."""
        there = len(self._batches) - number * self.batches_per_round
        return range(max(0, there), self.batches_per_round)

    def _require_answers(self, number: int) -> None:
        if missing := self.missing(number):
            raise RuntimeError(
                f"round {number}: got {len(missing)} of {self.batches_per_round} batches of answers damaged or gone, "
                "expected them on disk: the policy that gave them has moved on; --resume an earlier checkpoint, or "
                "choose another --output-dir"
            )

    def add(self, batch: AnsweredBatch) -> None:
        """The next batch, on disk when this returns."""
        self._answers.append(len(self._batches), batch)
        self._batches.append(batch)

    def ranked(self, number: int, judge: Judge) -> RankedRound | None:
        """The pairs of a round, those before it known: from the disk, or judged now and then on disk.

        Raises:
            RuntimeError: neither pairs nor all answers of a round whose steps have begun are on disk.
        """
        if number < len(self._rounds):
            return self._rounds[number]
        self._require_answers(number)
        first = number * self.batches_per_round
        found = judge(number, joined(self._batches[first : first + self.batches_per_round]))
        if found is not None:
            self._pairs.append(number, {"pairs": found.rows, "figures": found.figures})
            self._rounds.append(found)
        return found


def open_rounds(config: IterativeRunConfig, directory: RunDirectory, *, step: int) -> RoundLog:
    """What is on disk of a run that has completed `step` steps. Errors as of `RoundLog`."""
    batches = num_batches(config.rounds.prompts_per_round, config.ranking.batch_size)
    return RoundLog(directory, batches_per_round=batches, current=step // config.rounds.steps_per_round)


def train_in_rounds(
    config: IterativeRunConfig,
    prompts: Sequence[Prompt],
    *,
    policy: RoundPolicy,
    reward: Scorer,
    rollout: Generator,
    judge: Judge,
    encode: Callable[[Sequence[Row]], list[PreferencePair]],
    columns: Iterable[str],
    evaluate: Callable[[int], HeldOut],
    run: Run,
    state: IterativeState,
    done: RoundLog,
) -> bool:
    """Answer, rank, learn, round after round. False where a round waits for somebody to judge its answers.

    Args:
        done: what is on disk of the rounds, opened at the step of `state`.
        encode: rows of pairs to pairs.
        columns: of a prompt's row that are kept with its answers.
        evaluate: the held-out answers of the policy after so many rounds.

    Raises:
        RuntimeError: two rounds in a row gave no pair.
    """
    per_round = config.rounds.steps_per_round
    pools = [encode(_known(done.ranked(number, judge), number)) for number in range(state.step // per_round)]
    for number in range(len(pools), config.num_rounds):
        log, begins = run.begin_step(state.step), state.step % per_round == 0
        if begins:
            with log.phase("answer"):
                answer_round(config, prompts, number, done, columns, policy=policy, reward=reward, rollout=rollout)
        ranked = done.ranked(number, judge)
        if ranked is None:
            return False
        pools.append(encode(ranked.rows))
        if begins:
            log.metrics.update({**round_metrics(ranked.figures), **rollout.metrics(), "round/number": float(number)})
            run.progress.message(f"round {number}: {len(pools[-1])} pairs of {ranked.figures['prompts']} prompts")
        if pools[-1]:
            learn(config, pools, log, policy=policy, evaluate=evaluate, run=run, state=state)
        else:
            skip_round(config, number, log, policy=policy, run=run, state=state)
    return True


def answer_round(
    config: IterativeRunConfig,
    prompts: Sequence[Prompt],
    number: int,
    done: RoundLog,
    columns: Iterable[str],
    *,
    policy: RoundPolicy,
    reward: Scorer,
    rollout: Generator,
) -> None:
    """Whatever of a round is not on disk yet, by the policy as it is now: version `number`."""
    if not (missing := done.missing(number)):
        return
    policy.send_weights(rollout, version=number).result()
    count, size = config.rounds.prompts_per_round, config.ranking.batch_size
    dealt = prompts_for_step(prompts, number, batch_size=count, seed=config.run.seed, key="rounds.prompts_per_round")
    for index in missing:
        answered, _ = answer_batch(
            dealt[index * size : (index + 1) * size],
            rollout=rollout,
            reward=reward,
            scoring=config.reward,
            max_new_tokens=config.rollout.max_new_tokens,
            num_samples=config.ranking.num_samples_per_prompt,
            step=number,
            version=number,
            columns=columns,
        )
        done.add(answered)


def learn(
    config: IterativeRunConfig,
    pools: Sequence[Sequence[PreferencePair]],
    log: StepLog,
    *,
    policy: RoundPolicy,
    evaluate: Callable[[int], HeldOut],
    run: Run,
    state: IterativeState,
) -> None:
    """The steps of the last of `pools`, from where the state is. `log`: of the first of them."""
    rounds, number = config.rounds, len(pools) - 1
    end = (number + 1) * rounds.steps_per_round
    state.empty_in_a_row = 0
    if number and state.step % rounds.steps_per_round == 0 and config.reference.follow == "round":
        policy.follow(step=state.step).result()
    while state.step < end:
        batch = replay_batch(
            pools,
            state.step % rounds.steps_per_round,
            batch_size=config.training.batch_size,
            replay_share=rounds.replay_share,
            seed=config.run.seed,
        )
        with log.phase("reference"):
            numbers = [policy.ref_logps(batch).result()] if config.dpo.uses_reference else []
        with log.phase("update"):
            log.metrics.update(policy.update(batch, *numbers, step=state.step).result())
        state.step += 1
        every, through = rounds.evaluate_every, number + 1
        if state.step == end < config.run.num_steps and every and through % every == 0:
            with log.phase("evaluate"):
                log.metrics.update(held_out_metrics(evaluate(through)))
        run.finish_step(log)
        run.checkpoint(state.step, {"policy": policy}, asdict(state), due=state.step == end)
        log = run.begin_step(state.step)


def skip_round(
    config: IterativeRunConfig, number: int, log: StepLog, *, policy: RoundPolicy, run: Run, state: IterativeState
) -> None:
    """Leave out the steps of a round that has nothing to learn from.

    Raises:
        RuntimeError: nor had the one before it, or there is no other.
    """
    state.step, state.empty_in_a_row = (number + 1) * config.rounds.steps_per_round, state.empty_in_a_row + 1
    run.progress.message(f"round {number}: no pair, so its {config.rounds.steps_per_round} steps are left out")
    run.finish_step(log)
    if state.empty_in_a_row == min(2, config.num_rounds):
        expected, remedy = EMPTY[config.rounds.label_by]
        raise RuntimeError(
            f"round {number}: got no pair in {state.empty_in_a_row} rounds in a row, expected {expected}; with a new "
            f"--output-dir {remedy}"
        )
    run.checkpoint(state.step, {"policy": policy}, asdict(state), due=True)


def joined(batches: Sequence[AnsweredBatch]) -> AnsweredBatch:
    """The batches of a round as one."""
    unscored = sum((Counter(batch.unscored) for batch in batches), Counter[str]())
    return AnsweredBatch(answers=[answer for batch in batches for answer in batch.answers], unscored=unscored)


def rank_round(config: IterativeRunConfig, answered: AnsweredBatch) -> RankedRound:
    """Pairs by the scores."""
    ranking = config.ranking
    rows, figures = ranked_pairs(
        answered.answers,
        pairs_per_prompt=ranking.pairs_per_prompt,
        min_gap=ranking.min_gap,
        on_cut=ranking.on_cut,
        seed=config.run.seed,
    )
    return RankedRound(rows=rows, figures={**figures, **answer_figures(answered)})


def answer_figures(answered: AnsweredBatch) -> dict[str, Any]:
    """The mean of each part of the reward, and the answers without a score."""
    parts = part_means([answer.parts for answer in answered.answers])
    return {"parts": parts, "unscored": sum(answered.unscored.values())}


def part_means(rows: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """Of each name, over the rows that have a number for it."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, number in row.items():
            if number is not None:
                found.setdefault(name, []).append(number)
    return {name: sum(numbers) / len(numbers) for name, numbers in found.items()}


def round_metrics(figures: Mapping[str, Any]) -> dict[str, float]:
    """`round/NAME` of every figure that is one number, `round/score`, and `reward/PART/mean`."""
    metrics = {f"round/{name}": float(value) for name, value in figures.items() if isinstance(value, int | float)}
    if "score" in figures:
        metrics["round/score"] = figures["score"]["mean"]
    return metrics | {f"reward/{name}/mean": mean for name, mean in figures["parts"].items()}


def held_out_metrics(held_out: HeldOut) -> dict[str, float]:
    """`held_out/NAME`: means over the answers that have a number, and the KL where it is known."""
    metrics = {f"held_out/{k}": mean for k, mean in part_means([one.scores for one in held_out.answers]).items()}
    return metrics if held_out.kl is None else {**metrics, "held_out/kl": held_out.kl}


def _known(ranked: RankedRound | None, number: int) -> list[Row]:
    if ranked is None:
        raise RuntimeError(
            f"round {number}: got neither its pairs nor anybody's judgements of its answers on disk, expected them, "
            "since later rounds have been trained; put the lines back into rounds.labels"
        )
    return ranked.rows

"""Answer prompts several times and score the answers, batch by batch, each batch on disk before the next starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignment.config import RewardConfig
from alignment.config.reward import GOLD
from alignment.interfaces import Generator, Scorer
from alignment.loops.run import Run
from alignment.ranking import ScoredAnswer, prompt_as_asked
from alignment.rollout_correction import require_current
from alignment.scores import kind_of, refuse_unscorable, score_metrics, shape_scores
from alignment.types import Prompt, Rollout, Score
from alignment.verified_lines import VerifiedLines


@dataclass(frozen=True, kw_only=True, slots=True)
class AnsweredBatch:
    """What came of some prompts."""

    answers: list[ScoredAnswer]
    unscored: Mapping[str, int] = field(default_factory=dict)
    """Answers without a score, which are left out, by the kind of failure."""


def answer_batch(
    prompts: Sequence[Prompt],
    *,
    rollout: Generator,
    reward: Scorer,
    scoring: RewardConfig,
    max_new_tokens: int,
    num_samples: int,
    step: int = 0,
    version: int = 0,
    columns: Iterable[str] = (),
) -> tuple[AnsweredBatch, dict[str, float]]:
    """`num_samples` answers to each prompt by policy `version`, scored; and what to log about them.

    One round of an iteration over policies is this with its own `step`, which seeds the sampling, and `version`.

    Args:
        scoring: its clip and penalties make a score of a total, its budget bounds the answers without one.
        max_new_tokens: the limit that the sampler has, see `alignment.scores.length_penalty`.
        columns: of a prompt's row that are kept with its answers.

    Raises:
        RuntimeError: more answers without a score than `scoring.max_unscorable` allows, or answers of other weights.
    """
    rollouts = rollout.generate(prompts, step=step, num_samples=num_samples).result()
    require_current(rollouts, version)
    scores = reward.score(rollouts).result()
    refuse_unscorable(rollouts, scores, scoring.max_unscorable)
    shaped = shape_scores(
        rollouts,
        scores,
        max_new_tokens=max_new_tokens,
        missing_eos_penalty=scoring.missing_eos_penalty,
        overlong_buffer=scoring.overlong_buffer,
        overlong_penalty=scoring.overlong_penalty,
        clip=scoring.clip,
    )
    names = sorted(columns)
    answers = [
        _scored(one, score, value, names)
        for one, score, value in zip(rollouts, scores, shaped, strict=True)
        if value is not None
    ]
    return AnsweredBatch(answers=answers, unscored=_reasons(scores)), score_metrics(scores)


def answer_prompts(
    prompts: Sequence[Prompt],
    *,
    rollout: Generator,
    reward: Scorer,
    batch_size: int,
    log: AnswerLog,
    run: Run,
    **settings: Any,
) -> list[AnsweredBatch]:
    """`answer_batch` over all prompts in their order, `batch_size` at a time, from where `log` ends.

    `settings`: of `answer_batch`.
    """
    done = log.read()
    for index in range(len(done), num_batches(len(prompts), batch_size)):
        step = run.begin_step(index)
        with step.phase("answer"):
            batch = prompts[index * batch_size : (index + 1) * batch_size]
            answered, metrics = answer_batch(batch, rollout=rollout, reward=reward, **settings)
        log.append(index, answered)
        done.append(answered)
        step.metrics.update({**metrics, **rollout.metrics()})
        run.finish_step(step)
    return done


def num_batches(num_prompts: int, batch_size: int) -> int:
    return -(-num_prompts // batch_size)


class AnswerLog:
    """The batches of a run so far, a verified line each.

    What follows a line that is not whole is answered again: seeds depend on the prompt alone, so the same answers
    come.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lines = path, VerifiedLines(path, "batch")

    def read(self, most: int | None = None) -> list[AnsweredBatch]:
        """As `VerifiedLines.read`."""
        return [
            AnsweredBatch(answers=[ScoredAnswer(**row) for row in saved["answers"]], unscored=saved["unscored"])
            for saved in self._lines.read(most)
        ]

    def append(self, index: int, batch: AnsweredBatch) -> None:
        """Batch `index`, on disk when this returns."""
        rows = [answer.row() for answer in batch.answers]
        self._lines.append(index, {"answers": rows, "unscored": dict(batch.unscored)})


def _scored(rollout: Rollout, score: Score, value: float, columns: Sequence[str]) -> ScoredAnswer:
    return ScoredAnswer(
        prompt_id=rollout.prompt.id,
        prompt=prompt_as_asked(rollout.prompt),
        sample_index=rollout.sample_index,
        response=rollout.response,
        finished=rollout.finish_reason == "stop",
        num_tokens=len(rollout.response_ids),
        score=value,
        parts=dict(score.parts),
        disagreement=score.disagreement,
        columns={name: rollout.prompt.columns[name] for name in columns if name in rollout.prompt.columns},
    )


def _reasons(scores: Sequence[Score]) -> dict[str, int]:
    """Answers without a score by the kind of their first failure."""
    return dict(
        Counter(
            next((kind_of(why) for name, why in score.failures.items() if not name.startswith(GOLD)), "no number")
            for score in scores
            if score.total is None
        )
    )

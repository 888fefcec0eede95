"""Answer the held-out prompts and compare two states of the policy, item by item."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from alignment.bootstrap import paired_bootstrap
from alignment.checkpoint import load_json, save_json
from alignment.config.reward import GOLD
from alignment.generation import HELD_OUT_STEP
from alignment.interfaces import Generator, LogprobWorker, Scorer
from alignment.rollout_correction import require_current
from alignment.scores import kind_of, refuse_unscorable
from alignment.types import Prompt, Rollout, Score


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One held-out prompt, answered."""

    prompt_id: str
    prompt: str
    response: str
    finish_reason: str
    scores: dict[str, float | None]
    """`score` is the weighted total; the parts follow by name."""
    failures: dict[str, str] = field(default_factory=dict)
    """Why a part has no number, by its name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """All held-out answers of one policy state."""

    answers: list[Answer]
    kl: float | None
    """Mean over answers of the summed log-ratio to the reference, in nats; None where nobody can be asked."""

    def save(self, path: Path) -> None:
        save_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> HeldOut:
        saved = load_json(path)
        return cls(answers=[Answer(**answer) for answer in saved["answers"]], kl=saved["kl"])


def evaluate(
    prompts: Sequence[Prompt],
    *,
    policy: LogprobWorker,
    reference: LogprobWorker | None,
    reward: Scorer,
    rollout: Generator,
    greedy: bool = False,
    version: int,
    max_unscorable: float | None = None,
) -> HeldOut:
    """One answer per prompt by policy `version`, scored, with the KL to the reference over these answers.

    Version 0 is the reference itself, whose KL is 0 and need not be computed.

    Args:
        max_unscorable: share of the answers that may have no score; None for any.

    Raises:
        RuntimeError: more of them have none.
    """
    if not prompts:
        return HeldOut(answers=[], kl=0.0)
    rollouts = rollout.generate(prompts, step=HELD_OUT_STEP, greedy=greedy).result()
    require_current(rollouts, version)
    scoring = reward.score(rollouts)
    kl = 0.0 if version == 0 else None
    if version > 0 and reference is not None:
        own, ref = policy.logprobs(rollouts), reference.logprobs(rollouts)
        gaps = [float((a - b).sum()) for a, b in zip(own.result(), ref.result(), strict=True)]
        kl = sum(gaps) / len(gaps)
    scores = scoring.result()
    if max_unscorable is not None:
        try:
            refuse_unscorable(rollouts, scores, max_unscorable)
        except RuntimeError as error:
            error.add_note("of the held-out prompts, before training: nothing was trained")
            raise
    return HeldOut(answers=scored_answers(rollouts, scores), kl=kl)


def scored_answers(rollouts: Sequence[Rollout], scores: Sequence[Score]) -> list[Answer]:
    return [
        Answer(
            prompt_id=rollout.prompt.id,
            prompt=rollout.prompt.messages[-1]["content"],
            response=rollout.response,
            finish_reason=rollout.finish_reason,
            scores={
                "score": score.total,
                **score.parts,
                "finished": float(rollout.finish_reason == "stop"),
            },
            failures=dict(score.failures),
        )
        for rollout, score in zip(rollouts, scores, strict=True)
    ]


def compare(before: HeldOut, after: HeldOut, *, seed: int) -> dict[str, dict[str, Any]]:
    """`{metric: {before, after, n, gain_ci95, higher_is_better}}` over the `n` items that both have a number for.

    Raises:
        ValueError: they answer different prompts.
    """
    asked, asked_again = ([answer.prompt_id for answer in state.answers] for state in (before, after))
    if asked != asked_again:
        same = len(set(asked) & set(asked_again))
        raise ValueError(
            f"held-out answers: got {len(asked)} before and {len(asked_again)} after with {same} prompts in common, "
            "expected the same prompts in one order; start again in another --output-dir"
        )
    table: dict[str, dict[str, Any]] = {}
    for name in before.answers[0].scores if before.answers else ():
        pairs = [
            (first, second)
            for a, b in zip(before.answers, after.answers, strict=True)
            if (first := a.scores[name]) is not None and (second := b.scores[name]) is not None
        ]
        if not pairs:
            continue
        old, new = [p[0] for p in pairs], [p[1] for p in pairs]
        _, low, high = paired_bootstrap(old, new, seed=seed)
        table[name] = {
            "before": sum(old) / len(old),
            "after": sum(new) / len(new),
            "n": len(pairs),
            "gain_ci95": [low, high],
            "higher_is_better": True,
        }
    return table


def unscored_warning(held_out: HeldOut, limit: float) -> str:
    """What to tell where more answers than the budget have no score; empty where they keep to it."""
    missing = [answer for answer in held_out.answers if answer.scores["score"] is None]
    if len(missing) <= limit * len(held_out.answers):
        return ""
    kinds = Counter(
        kind_of(failure)
        for answer in missing
        for name, failure in answer.failures.items()
        if not name.startswith(GOLD)
    )
    counted = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return (
        f"WARNING: {len(missing)} of {len(held_out.answers)} held-out answers have no score ({counted}), more than "
        f"reward.max_unscorable, {limit:.0%}: the summary compares the others alone, see n there"
    )


def answer_table(before: HeldOut, after: HeldOut, *, num_shown: int, width: int = 300) -> str:
    """Held-out prompts with both answers, those with the largest gain and the largest loss first and last.

    What has no score before or after has no place in the ranking, and is left out.
    """

    gains = {
        i: new - old
        for i, (a, b) in enumerate(zip(before.answers, after.answers, strict=True))
        if (old := a.scores["score"]) is not None and (new := b.scores["score"]) is not None
    }
    order = sorted(gains, key=gains.__getitem__, reverse=True)
    # A spread over the whole ranking, the worst included: a table of the best alone would flatter.
    count = min(num_shown, len(order))
    chosen = [order[round(k * (len(order) - 1) / max(count - 1, 1))] for k in range(count)]
    lines = []
    for i in chosen:
        a, b = before.answers[i], after.answers[i]
        lines.append(f"PROMPT  {_line(a.prompt, width)}")
        lines.append(f"before  {_number(a)}  {_line(a.response, width)}{_cut(a)}")
        lines.append(f"after   {_number(b)}  {_line(b.response, width)}{_cut(b)}\n")
    return "\n".join(lines)


def _number(answer: Answer) -> str:
    score = answer.scores["score"]
    return "  none" if score is None else f"{score:+6.2f}"


def _line(text: str, width: int) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"


def _cut(answer: Answer) -> str:
    return "" if answer.finish_reason == "stop" else " [cut off]"

"""What a finished reward model is worth: accuracy, calibration, what length alone would have decided, and its worst
decisions."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from alignment.bootstrap import paired_bootstrap
from alignment.calibration import best_threshold, calibration_table, expected_calibration_error, spearman
from alignment.judgements import JudgedAnswer, Judgement, Ranking, SteppedAnswer, kind_of
from alignment.loops.offline import accuracy_report
from alignment.types import PreferencePair

NUM_WORST = 10
COMPARED = ("pairs", "rankings")
Scores = Sequence[Sequence[float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """One thing that a reward model gets right or wrong: which of two answers is better, or what one is worth."""

    id: str
    source: str
    margin: float
    """How far it is right: above 0, except for ratings, where it is minus the error."""
    correct: bool
    predicted: float
    """Compared: the confidence in the answer that scores higher. Judged: sigmoid of the score."""
    observed: float
    """Compared: whether that is right. Judged: the target."""
    scores: tuple[float, ...]
    lengths: tuple[int, ...]
    """Tokens of each answer, or up to the end of the step."""


def decisions(record: Judgement, scores: Sequence[float]) -> Iterator[Decision]:
    """All that is decided of a record: of a pair one thing, of a ranking each pair that does not tie, of an answer
    one, of steps each."""
    kind = kind_of(record)
    if kind == "pairs":
        pair = cast(PreferencePair, record)
        yield _compared(record.id, record, scores, (len(pair.chosen_ids), len(pair.rejected_ids)))
    elif kind == "rankings":
        ranking = cast(Ranking, record)
        lengths = [len(ids) for ids in ranking.answer_ids]
        for i, j in itertools.combinations(range(len(lengths)), 2):
            if ranking.ranks[i] < ranking.ranks[j]:
                name = f"{record.id}/{i + 1}>{j + 1}"
                yield _compared(name, record, (scores[i], scores[j]), (lengths[i], lengths[j]))
    elif kind == "steps":
        stepped = cast(SteppedAnswer, record)
        for i, (score, target, end) in enumerate(zip(scores, stepped.targets, stepped.step_ends, strict=True)):
            yield _judged(f"{record.id}/{i + 1}", record, score, target, end + 1)
    else:
        judged = cast(JudgedAnswer, record)
        yield _judged(record.id, record, scores[0], judged.target, len(judged.answer_ids), rated=kind == "ratings")


def _compared(name: str, record: Judgement, scores: Sequence[float], lengths: tuple[int, int]) -> Decision:
    margin = scores[0] - scores[1]
    return Decision(
        id=name,
        source=record.source,
        margin=margin,
        correct=margin > 0,
        predicted=_sigmoid(abs(margin)),
        observed=float(margin > 0),
        scores=tuple(scores),
        lengths=lengths,
    )


def _judged(
    name: str, record: Judgement, score: float, target: float, length: int, *, rated: bool = False
) -> Decision:
    yes = target >= 0.5
    return Decision(
        id=name,
        source=record.source,
        margin=-abs(_sigmoid(score) - target) if rated else (score if yes else -score),
        correct=(score >= 0) == yes,
        predicted=_sigmoid(score),
        observed=target,
        scores=(score,),
        lengths=(length,),
    )


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def record_report(records: Sequence[Judgement], scores: Scores, *, seed: int = 0) -> dict[str, Any]:
    """Accuracy over records with its 95 % interval, and each record's own.

    Wilson's where a record is one decision behind a prompt of its own. Else a record counts by its share of right
    ones, and prompts are resampled with all of their records.
    """
    shares = [
        statistics.fmean(float(decision.correct) for decision in decisions(record, row))
        for record, row in zip(records, scores, strict=True)
    ]
    return _shares_report(records, shares, seed)


def prompts_of(records: Sequence[Judgement]) -> list[tuple[int, ...]]:
    """What records have in common with each other, and are resampled by."""
    return [record.prompt_ids for record in records]


def _shares_report(records: Sequence[Judgement], shares: Sequence[float], seed: int) -> dict[str, Any]:
    prompts = prompts_of(records)
    one_decision_each = kind_of(records[0]) not in ("rankings", "steps") and set(shares) <= {0.0, 1.0}
    if one_decision_each and len(set(prompts)) == len(prompts):
        return accuracy_report(shares)
    mean, low, high = paired_bootstrap([0.0] * len(shares), shares, groups=prompts, seed=seed)
    return {"accuracy": mean, "accuracy_ci95": [low, high], "n": len(shares), "correct": list(shares)}


def reward_report(
    train: Sequence[Judgement],
    held_out: Sequence[Judgement],
    scores: Scores,
    *,
    step: int,
    seed: int,
    decode: Callable[[Sequence[int]], str],
) -> dict[str, Any]:
    """Everything that is told of a finished model, as JSON takes it.

    Args:
        train: what the length rule and the most frequent label are taken from.
        scores: of the held-out records.
        decode: ids to text, for the worst decisions alone.
    """
    kind = kind_of(held_out[0])
    made = [list(decisions(record, row)) for record, row in zip(held_out, scores, strict=True)]
    flat = [decision for several in made for decision in several]
    report = {
        "kind": kind,
        "step": step,
        "accuracy": _without_items(record_report(held_out, scores, seed=seed)),
        "by_source": _by_source(held_out, scores, seed),
        "calibration": _calibration(flat, kind),
        "length": _length(train, held_out, made, seed),
        "scores": {
            "mean": statistics.fmean(score for row in scores for score in row),
            "std": statistics.pstdev(score for row in scores for score in row),
        },
        "worst": _worst(held_out, made, decode),
    }
    if kind not in COMPARED:
        report["majority_floor"] = _majority_floor(train, flat)
    if kind == "ratings":
        report["rating"] = {
            "spearman": spearman([d.scores[0] for d in flat], [d.observed for d in flat]),
            "mean_error": statistics.fmean(-d.margin for d in flat),
        }
    return report


def _without_items(report: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in report.items() if name != "correct"}


def _by_source(held_out: Sequence[Judgement], scores: Scores, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for source in sorted({record.source for record in held_out}):
        own = [i for i, record in enumerate(held_out) if record.source == source]
        report = record_report([held_out[i] for i in own], [scores[i] for i in own], seed=seed)
        found[source] = _without_items(report)
    return found


def _calibration(flat: Sequence[Decision], kind: str) -> dict[str, Any]:
    low = 0.5 if kind in COMPARED else 0.0
    bins = calibration_table([d.predicted for d in flat], [d.observed for d in flat], low=low)
    return {"ece": expected_calibration_error(bins), "bins": [asdict(one) for one in bins]}


def _length(
    train: Sequence[Judgement], held_out: Sequence[Judgement], made: Sequence[Sequence[Decision]], seed: int
) -> dict[str, Any]:
    """How far scores go with length, and what the rule on length that fits the training rows best gets right."""
    rule, words = _length_rule(train, kind_of(held_out[0]))
    shares = [statistics.fmean(rule(decision) for decision in several) for several in made]
    own = [statistics.fmean(float(decision.correct) for decision in several) for several in made]
    baseline = _shares_report(held_out, shares, seed)
    _, low, high = paired_bootstrap(shares, own, groups=prompts_of(held_out), seed=seed)
    pairs = {(d.scores[i], d.lengths[i]) for some in made for d in some for i in range(len(d.scores))}
    scores, lengths = zip(*sorted(pairs), strict=True)
    return {
        "spearman": spearman(scores, lengths),
        "baseline_rule": words,
        "baseline": _without_items(baseline),
        "gain_over_baseline_ci95": [low, high],
    }


def _length_rule(train: Sequence[Judgement], kind: str) -> tuple[Callable[[Decision], float], str]:
    """How often a rule on length decides right, which tosses a coin over two answers of one length, and the rule in
    words."""
    known = [d for record in train for d in decisions(record, [0.0] * sum(map(len, record.reads)))]
    if kind in COMPARED:
        longer = sum(d.lengths[0] > d.lengths[1] for d in known)
        shorter = sum(d.lengths[0] < d.lengths[1] for d in known)
        sign = 1 if longer >= shorter else -1
        words = "the longer" if sign > 0 else "the shorter"
        return lambda d: _coin(sign * (d.lengths[0] - d.lengths[1])), words
    cut = best_threshold([d.lengths[0] for d in known], [d.observed >= 0.5 for d in known])
    words = f"yes {'from' if cut.above else 'below'} {cut.bound:g} tokens"
    return lambda d: float(cut(d.lengths[0]) == (d.observed >= 0.5)), words


def _coin(margin: float) -> float:
    return 0.5 if margin == 0 else float(margin > 0)


def _majority_floor(train: Sequence[Judgement], flat: Sequence[Decision]) -> float:
    """The share of held-out decisions that the most frequent training answer gets right."""
    known = [d.observed >= 0.5 for record in train for d in decisions(record, [0.0] * sum(map(len, record.reads)))]
    frequent = 2 * sum(known) >= len(known)
    return statistics.fmean(float((d.observed >= 0.5) == frequent) for d in flat)


def _worst(
    held_out: Sequence[Judgement], made: Sequence[Sequence[Decision]], decode: Callable[[Sequence[int]], str]
) -> list[dict[str, Any]]:
    ranked = sorted(
        ((decision, record) for record, several in zip(held_out, made, strict=True) for decision in several),
        key=lambda item: (item[0].margin, item[0].id),
    )
    return [
        {
            "id": decision.id,
            "source": decision.source,
            "margin": decision.margin,
            "scores": list(decision.scores),
            "lengths": list(decision.lengths),
            "target": decision.observed,
            "texts": [decode(ids) for ids in record.sequences],
        }
        for decision, record in ranked[:NUM_WORST]
    ]


def render(report: Mapping[str, Any], *, texts: bool) -> str:
    """The report as Markdown. `texts`: with what the worst decisions were about, for a private file alone."""
    accuracy, length, calibration = report["accuracy"], report["length"], report["calibration"]
    lines = [
        f"# Reward model on {report['kind']}, step {report['step']}",
        "",
        f"- held-out accuracy {_interval(accuracy)}",
        f"- length alone ({length['baseline_rule']}) {_interval(length['baseline'])}; gain over it "
        f"{length['gain_over_baseline_ci95'][0]:+.3f} .. {length['gain_over_baseline_ci95'][1]:+.3f}",
        f"- Spearman of score and length {_number(length['spearman'])}",
        f"- expected calibration error {calibration['ece']:.3f}",
        f"- scores {report['scores']['mean']:.3f} +- {report['scores']['std']:.3f}",
    ]
    if "majority_floor" in report:
        lines.append(f"- the most frequent training answer gets {report['majority_floor']:.3f} right")
    if "rating" in report:
        rating = report["rating"]
        lines.append(f"- ratings: Spearman {_number(rating['spearman'])}, mean error {rating['mean_error']:.3f}")
    lines += ["", "| source | accuracy, 95 % interval |", "|---|---|"]
    lines += [f"| {name or '-'} | {_interval(own)} |" for name, own in report["by_source"].items()]
    lines += ["", "| predicted from .. to | items | predicted | observed |", "|---|---|---|---|"]
    lines += [
        f"| {one['low']:.2f} .. {one['high']:.2f} | {one['count']} | {_number(one['predicted'])} "
        f"| {_number(one['observed'])} |"
        for one in calibration["bins"]
    ]
    lines += ["", "| worst decisions | source | scores | tokens |", "|---|---|---|---|"]
    for worst in report["worst"]:
        scores = ", ".join(f"{score:.3f}" for score in worst["scores"])
        lines.append(f"| {worst['id']} | {worst['source'] or '-'} | {scores} | {worst['lengths']} |")
    if texts:
        for worst in report["worst"]:
            lines += ["", f"## {worst['id']}", ""]
            lines += [f"    {json.dumps(text, ensure_ascii=False)}" for text in worst["texts"]]
    return "\n".join(lines) + "\n"


def _interval(report: Mapping[str, Any]) -> str:
    low, high = report["accuracy_ci95"]
    return f"{report['accuracy']:.3f} ({low:.3f} .. {high:.3f}), n={report['n']}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"

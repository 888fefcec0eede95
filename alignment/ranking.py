"""Preference data out of scored answers: which two of a prompt make a pair, which one is desirable, and figures."""

from __future__ import annotations

import hashlib
import math
import statistics
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from typing import Any

from alignment.bootstrap import paired_bootstrap
from alignment.config.ranking import OnCut, UnsureBy
from alignment.types import Prompt

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredAnswer:
    """One answer of the policy with its score. Plain data: a line of `answers.jsonl`."""

    prompt_id: str
    prompt: str | list[dict[str, str]]
    """As `prompt_as_asked`."""
    sample_index: int
    response: str
    """Decoded, without the end token."""
    finished: bool
    """Whether it ended by itself; False where the limit cut it off."""
    num_tokens: int
    """Sampled tokens, the end token included."""
    score: float
    parts: Mapping[str, float | None] = field(default_factory=dict)
    """Unweighted, by name."""
    disagreement: float | None = None
    """Standard deviation of several reward models' scores."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Columns of the prompt's row that the rewards read."""

    def row(self) -> Row:
        return asdict(self)


def prompt_as_asked(prompt: Prompt) -> str | list[dict[str, str]]:
    """Text where a user's single turn was asked, else the whole conversation: what a data file has in `prompt`."""
    messages = [dict(message) for message in prompt.messages]
    alone = len(messages) == 1 and messages[0] == {"role": "user", "content": messages[0]["content"]}
    return messages[0]["content"] if alone else messages


def by_prompt(answers: Iterable[ScoredAnswer]) -> dict[str, list[ScoredAnswer]]:
    """The answers of each prompt, in their order."""
    found: dict[str, list[ScoredAnswer]] = {}
    for answer in answers:
        found.setdefault(answer.prompt_id, []).append(answer)
    return found


def distinct(answers: Iterable[ScoredAnswer]) -> list[ScoredAnswer]:
    """Answers to one prompt, each text once, those that no data file can hold left out.

    Copies of a text may have several scores (a judge asked twice): it has their mean. It is finished where one is.
    Texts are compared as tokenizers may see them: without surrounding space, composed.
    """
    copies: dict[str, list[ScoredAnswer]] = {}
    for answer in answers:
        if text := _text(answer):
            copies.setdefault(text, []).append(answer)
    return [
        replace(
            same[0],
            # The sum of equal numbers, divided, may be another number.
            score=same[0].score if len({a.score for a in same}) == 1 else statistics.fmean(a.score for a in same),
            finished=any(a.finished for a in same),
        )
        for same in copies.values()
    ]


def best_pairs(
    answers: Sequence[ScoredAnswer], *, most: int, min_gap: float, on_cut: OnCut
) -> list[tuple[ScoredAnswer, ScoredAnswer]]:
    """(chosen, rejected) of one prompt's distinct answers: the largest gap first, otherwise in the order of answers.

    Args:
        most: pairs.
        min_gap: by how much the chosen one's score is higher, at least; scores that are equal give no pair.
        on_cut: see `RankingConfig`.
    """
    good = [a for a in answers if a.finished or on_cut == "keep"]
    poor = [a for a in answers if a.finished or on_cut != "skip"]
    # 0.9 - 0.6 is a gap of 0.3.
    pairs = [(a, b) for a in good for b in poor if a.score > b.score and a.score - b.score >= min_gap - 1e-9]
    return sorted(pairs, key=lambda pair: pair[1].score - pair[0].score)[:most]


def labels_of(answers: Iterable[ScoredAnswer], *, threshold: float, on_cut: OnCut) -> list[tuple[ScoredAnswer, bool]]:
    """Whether each distinct answer is desirable: its score reaches the threshold.

    With `reject` a cut answer that reaches it is neither one: its score says the contrary of its missing end.
    """
    labels = [(answer, answer.score >= threshold) for answer in answers]
    return [
        (answer, desirable)
        for answer, desirable in labels
        if answer.finished or on_cut == "keep" or (on_cut == "reject" and not desirable)
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferenceData:
    """Rows of the two data files, and what came of the answers."""

    pairs: list[Row]
    labels: list[Row]
    figures: dict[str, Any]


def preference_data(
    answers: Sequence[ScoredAnswer],
    *,
    pairs_per_prompt: int,
    min_gap: float,
    label_threshold: float,
    on_cut: OnCut,
    seed: int = 0,
) -> PreferenceData:
    """Pairs and labels of scored answers, in the order of prompts.

    Args:
        seed: of the bootstrap behind the interval of the mean score.
    """
    pairs, figures = ranked_pairs(
        answers, pairs_per_prompt=pairs_per_prompt, min_gap=min_gap, on_cut=on_cut, seed=seed
    )
    labels = [
        label
        for own in by_prompt(answers).values()
        for label in labels_of(distinct(own), threshold=label_threshold, on_cut=on_cut)
    ]
    return PreferenceData(
        pairs=pairs,
        labels=[label_row(answer, desirable) for answer, desirable in labels],
        figures={
            **figures,
            "desirable": sum(desirable for _, desirable in labels),
            "undesirable": sum(not desirable for _, desirable in labels),
        },
    )


def ranked_pairs(
    answers: Sequence[ScoredAnswer], *, pairs_per_prompt: int, min_gap: float, on_cut: OnCut, seed: int = 0
) -> tuple[list[Row], dict[str, Any]]:
    """Pairs of scored answers as rows, in the order of prompts, and figures of the answers and of them.

    Args:
        seed: of the bootstrap behind the interval of the mean score.
    """
    prompts = by_prompt(answers)
    different = {name: distinct(own) for name, own in prompts.items()}
    pairs = [
        pair
        for own in different.values()
        for pair in best_pairs(own, most=pairs_per_prompt, min_gap=min_gap, on_cut=on_cut)
    ]
    figures = {
        **score_figures(list(prompts.values()), seed=seed),
        "duplicates": sum(_num_written(own) for own in prompts.values()) - sum(map(len, different.values())),
        "empty": len(answers) - sum(_num_written(own) for own in prompts.values()),
        "cut": sum(not answer.finished for answer in answers),
        "prompts_of_one_score": sum(len({a.score for a in own}) < 2 for own in different.values()),
        **pair_figures(pairs, num_prompts=len(prompts)),
    }
    return [pair_row(chosen, rejected) for chosen, rejected in pairs], figures


def pair_row(chosen: ScoredAnswer, rejected: ScoredAnswer) -> Row:
    """A line that `alignment.data.preferences.read_pair` reads; `group` keeps a prompt whole."""
    return {
        "prompt": chosen.prompt,
        "chosen": chosen.response,
        "rejected": rejected.response,
        "chosen_score": chosen.score,
        "rejected_score": rejected.score,
        "group": chosen.prompt_id,
    }


def label_row(answer: ScoredAnswer, desirable: bool) -> Row:
    """A line that `alignment.data.judgements.load_judgements` reads as kind labels."""
    return {
        "prompt": answer.prompt,
        "completion": answer.response,
        "label": desirable,
        "score": answer.score,
        "group": answer.prompt_id,
    }


def rows_to_label(answers: Iterable[ScoredAnswer], *, most: int, unsure_by: UnsureBy, on_cut: OnCut) -> list[Row]:
    """Pairs of which the scores are least sure, for a person: one of a prompt at most, the least sure first.

    A row is a ranking whose answers tie, which `alignment.data.judgements.load_judgements` refuses until the person
    has set `ranks` to [1, 2] or [2, 1], 1 the better. Neither it nor the order says anything of the scores.

    Args:
        most: rows.
        unsure_by: "gap", the smallest one between two scores; "disagreement", the largest sum over both answers, of
            which those without one are left out.
        on_cut: with "keep" a cut answer may be shown.
    """

    def doubt(pair: tuple[ScoredAnswer, ScoredAnswer]) -> float:
        a, b = pair
        return -abs(a.score - b.score) if unsure_by == "gap" else (a.disagreement or 0.0) + (b.disagreement or 0.0)

    found = []
    for own in by_prompt(answers).values():
        shown = [a for a in distinct(own) if a.finished or on_cut == "keep"]
        if unsure_by == "disagreement":
            shown = [a for a in shown if a.disagreement is not None]
        if len(shown) > 1:
            found.append(max(combinations(shown, 2), key=doubt))
    chosen = sorted(found, key=doubt, reverse=True)[:most]
    return [
        {
            "prompt": pair[0].prompt,
            "answers": sorted((a.response for a in pair), key=lambda text: hashlib.sha256(text.encode()).digest()),
            "ranks": [1, 1],
            "group": pair[0].prompt_id,
        }
        for pair in chosen
    ]


def score_figures(prompts: Sequence[Sequence[ScoredAnswer]], *, seed: int) -> dict[str, Any]:
    """Means over prompts of the mean, best and worst score. Prompts are what the interval resamples: the answers to
    one are alike."""
    figures: dict[str, Any] = {"prompts": len(prompts), "answers": sum(map(len, prompts))}
    if prompts:
        means = [statistics.fmean(a.score for a in own) for own in prompts]
        mean, low, high = paired_bootstrap([0.0] * len(means), means, seed=seed)
        figures["score"] = {"mean": mean, "ci95": [low, high]}
        figures["best_score"] = statistics.fmean(max(a.score for a in own) for own in prompts)
        figures["worst_score"] = statistics.fmean(min(a.score for a in own) for own in prompts)
    return figures


def pair_figures(pairs: Sequence[tuple[ScoredAnswer, ScoredAnswer]], *, num_prompts: int) -> dict[str, Any]:
    """How many, from how many of the prompts, and whether the longer answer is the chosen one."""
    figures: dict[str, Any] = {
        "pairs": len(pairs),
        "share_of_prompts_with_a_pair": len({a.prompt_id for a, _ in pairs}) / num_prompts if num_prompts else 0.0,
    }
    if pairs:
        longer = sum(a.num_tokens > b.num_tokens for a, b in pairs)
        figures["gap"] = math.fsum(a.score - b.score for a, b in pairs) / len(pairs)
        figures["chosen_tokens"] = statistics.fmean(a.num_tokens for a, _ in pairs)
        figures["rejected_tokens"] = statistics.fmean(b.num_tokens for _, b in pairs)
        figures["chosen_longer_share"] = longer / len(pairs)
    return figures


def table(figures: Mapping[str, Any]) -> str:
    """The figures as lines, without any text of the data."""
    lines = []
    for name, value in figures.items():
        said = f"{value:.3f}" if isinstance(value, float) else str(value)
        if isinstance(value, Mapping):
            low, high = value["ci95"]
            said = f"{value['mean']:.3f}  ({low:.3f} .. {high:.3f})"
        lines.append(f"{name.replace('_', ' '):<30} {said}")
    return "\n".join(lines)


def _text(answer: ScoredAnswer) -> str:
    """What tells texts apart; empty for one that no row of a data file may hold."""
    return "" if "\0" in answer.response else unicodedata.normalize("NFC", answer.response.strip())


def _num_written(answers: Iterable[ScoredAnswer]) -> int:
    return sum(bool(_text(answer)) for answer in answers)

"""Judgements of answers out of rows: pairs, rankings, ratings, labels and steps, tokenised behind their prompts."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from alignment.config.data import SourceConfig
from alignment.config.reward_model import RewardDataConfig
from alignment.data.chat import decode
from alignment.data.dialects import canonical
from alignment.data.preferences import PAIR_COUNTS, read_pair
from alignment.data.prompts import prompt_id
from alignment.data.reading import (
    Encoded,
    Encoder,
    J,
    Messages,
    Reading,
    TooLong,
    collect,
    filled,
    group_of,
    number,
    text_of,
)
from alignment.data.sources import Row, column, read_rows
from alignment.data.split import Split, digest
from alignment.judgements import Judgement, LabelledAnswer, Ranking, RatedAnswer, SteppedAnswer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER_COLUMNS = ("response", "completion", "answer")
COLUMNS: dict[str, tuple[str, ...]] = {
    "pairs": ("chosen", "rejected"),
    "rankings": ("prompt", "answers"),
    "ratings": ("prompt", "ratings"),
    "labels": ("prompt", "label"),
    "steps": ("prompt", "steps", "step_labels"),
}
"""What tells a kind, beside an answer in one of `ANSWER_COLUMNS` for ratings and labels."""
LABELS: dict[object, float] = {
    **dict.fromkeys([True, 1, "1", "+1", "true", "yes", "up", "thumbs_up", "\N{THUMBS UP SIGN}"], 1.0),
    **dict.fromkeys([False, 0, -1, "0", "-1", "false", "no", "down", "thumbs_down", "\N{THUMBS DOWN SIGN}"], 0.0),
}


@dataclass(frozen=True, slots=True)
class JudgementSet:
    """Records of one kind."""

    kind: str
    split: Split[Judgement]

    @property
    def train(self) -> list[Judgement]:
        return self.split.train

    @property
    def held_out(self) -> list[Judgement]:
        return self.split.held_out

    def summary(self) -> str:
        """One line without any text of the data."""
        return f"{self.kind}: {self.split.summary()}"


def load_judgements(
    config: RewardDataConfig, tokenizer: PreTrainedTokenizerBase, *, eos_ids: frozenset[int] | None = None
) -> JudgementSet:
    """Read, render, cut, drop duplicates, and hold out whole prompts (whole `group`s where rows have that column).

    docs/reward_models.md has the columns of each kind. `counts` has rows, duplicates, truncated (an answer was cut),
    contradictory, and by kind chosen_longer, ties (rankings with some), split_raters, positive (labels, steps).

    Raises:
        ValueError: `file:line: reason` for a row of another kind, or one that cannot be learnt from.
    """
    encoder = Encoder(
        tokenizer=tokenizer,
        eos_ids=eos_ids,
        max_tokens=config.max_tokens,
        system_prompt=config.system_prompt,
        end_cut=config.end_cut_answers,
        cut_prompts=config.cut_prompts,
    )
    rows = list(_named(config.source))
    more = [named for source in config.also for named in _named(source)]
    kind = _kind(rows[0][0]) if config.kind == "auto" else config.kind
    names = {row.where: name for row, name in [*rows, *more]}

    def read(row: Row) -> Reading[Judgement]:
        _refuse_other_kind(row, kind)
        source = str(row.values.get(config.report_by) or names[row.where])
        return READERS[kind](row, encoder, config, source)

    split = collect(
        (row for row, _ in rows),
        read,
        wanted=config.held_out,
        told=COUNTS[kind],
        what=kind,
        skip_long=config.on_long == "skip",
        also=(row for row, _ in more),
    )
    return JudgementSet(kind, split)


def _named(source: SourceConfig) -> Iterator[tuple[Row, str]]:
    """Every row, in our columns, with the name of its source."""
    yield from ((canonical(row), source_name(source)) for row in read_rows(source))


def source_name(source: SourceConfig) -> str:
    """The asset, the hub data set, or the file's name without its folder."""
    return source.asset or source.hub or str(source.path).rstrip("/").rsplit("/", 1)[-1]


def _kind(row: Row) -> str:
    fitting = [kind for kind in COLUMNS if fits(row, kind)]
    if len(fitting) == 1:
        return fitting[0]
    known = "; ".join(f"{kind}: {'+'.join(names)}" for kind, names in COLUMNS.items())
    got = f"which fit {' and '.join(fitting)}" if fitting else "which fit no kind of judgement"
    raise ValueError(
        f"{row.where}: got columns {filled(row.values)}, {got}, expected those of one ({known}); set data.kind, or "
        "rename the columns"
    )


def fits(row: Row, kind: str) -> bool:
    """Whether a row has the columns of a kind."""
    return all(row.values.get(name) is not None for name in COLUMNS[kind])


def _refuse_other_kind(row: Row, kind: str) -> None:
    if fits(row, kind) or kind == "pairs":  # a pair says itself what it lacks
        return
    others = [other for other in COLUMNS if fits(row, other)]
    if others:
        raise ValueError(
            f"got a row of {' or '.join(others)}, expected {kind}, as data.kind says or the first row is; keep one "
            "kind in a run"
        )


def _read_pair(row: Row, encoder: Encoder, config: RewardDataConfig, source: str) -> Reading[Judgement]:
    reading = read_pair(row, encoder, source=source, margin_key=config.margin_key)
    return cast(Reading[Judgement], reading)


def _read_ranking(row: Row, encoder: Encoder, config: RewardDataConfig, source: str) -> Reading[Judgement]:
    answers = row.values.get("answers")
    if isinstance(answers, list) and len(answers) > config.max_answers:
        raise ValueError(
            f"'answers': got {len(answers)} answers, expected a list of 2 to data.max_answers={config.max_answers}; "
            "correct the row, or raise data.max_answers"
        )
    return cast(Reading[Judgement], read_ranking(row, encoder, source=source))


def read_ranking(row: Row, encoder: Encoder, *, source: str = "") -> Reading[Ranking]:
    """One row as a ranking. Raises as `load_judgements`, without the place."""
    messages, answers = encoder.messages(row), column(row, "answers")
    if not isinstance(answers, list) or len(answers) < 2:
        got = f"{len(answers)} answers" if isinstance(answers, list) else type(answers).__name__
        raise ValueError(f"'answers': got {got}, expected a list of 2 or more; correct the row")
    texts = [text_of(answer, "answers") for answer in answers]
    if len(set(texts)) < len(texts):
        raise ValueError("'answers': got one answer twice, expected different ones; remove it")
    ranks = _ranks(row.values.get("ranks"), len(texts))
    order = sorted(range(len(texts)), key=lambda i: ranks[i])
    texts, ranks = [texts[i] for i in order], [ranks[i] for i in order]
    encoded = encoder.answers(messages, texts)
    if len(set(encoded.answer_ids)) < len(texts):
        raise TooLong(
            f"got two answers that are the same within data.max_tokens={encoder.max_tokens}, expected different ones; "
            "raise it or remove the row"
        )
    record = Ranking(
        id=digest("\0".join([prompt_id(messages), *texts, str(ranks)])),
        prompt_ids=encoded.prompt_ids,
        answer_ids=tuple(encoded.answer_ids),
        ranks=tuple(ranks),
        source=source,
    )
    ties = len(set(ranks)) < len(ranks)
    return _reading(record, row, messages, encoded, ("ties",) * ties)


def _ranks(value: Any, count: int) -> list[int]:
    """As given, or the order of the answers."""
    if value is None:
        return list(range(1, count + 1))
    if not isinstance(value, list) or len(value) != count or not all(type(rank) is int and rank > 0 for rank in value):
        raise ValueError(f"'ranks': got {value!r}, expected {count} whole numbers, 1 the best; correct the row")
    if len(set(value)) == 1:
        raise ValueError("'ranks': got the same for all answers, expected an order; remove the row")
    return value


def _answer(row: Row) -> str:
    name = next((name for name in ANSWER_COLUMNS if row.values.get(name) is not None), ANSWER_COLUMNS[0])
    return text_of(column(row, name), name)


def _read_rating(row: Row, encoder: Encoder, config: RewardDataConfig, source: str) -> Reading[Judgement]:
    return cast(Reading[Judgement], read_rating(row, encoder, source=source))


def read_rating(row: Row, encoder: Encoder, *, source: str = "") -> Reading[RatedAnswer]:
    """One row as a rated answer. Raises as `load_judgements`, without the place."""
    messages, answer, given = encoder.messages(row), _answer(row), column(row, "ratings")
    if given == []:
        raise ValueError("'ratings': got an empty list, expected numbers from 0 to 1; remove the row")
    ratings = [
        number(rating, "ratings", low=0.0, high=1.0) for rating in (given if isinstance(given, list) else [given])
    ]
    spread = statistics.pstdev(ratings)
    encoded = encoder.answers(messages, [answer])
    record = RatedAnswer(
        id=digest("\0".join([prompt_id(messages), answer])),
        prompt_ids=encoded.prompt_ids,
        answer_ids=encoded.answer_ids[0],
        target=statistics.fmean(ratings),
        agreement=1 - spread,
        source=source,
    )
    return _reading(record, row, messages, encoded, ("split_raters",) * (spread > 0))


def _read_label(row: Row, encoder: Encoder, config: RewardDataConfig, source: str) -> Reading[Judgement]:
    return cast(Reading[Judgement], read_label(row, encoder, source=source))


def read_label(row: Row, encoder: Encoder, *, source: str = "") -> Reading[LabelledAnswer]:
    """One row as a labelled answer. Raises as `load_judgements`, without the place."""
    messages, answer = encoder.messages(row), _answer(row)
    target = label_of(column(row, "label"), "label")
    encoded = encoder.answers(messages, [answer])
    name, other = (digest("\0".join([prompt_id(messages), answer, f"{t:g}"])) for t in (target, 1 - target))
    record = LabelledAnswer(
        id=name, prompt_ids=encoded.prompt_ids, answer_ids=encoded.answer_ids[0], target=target, source=source
    )
    return _reading(record, row, messages, encoded, ("positive",) * (target == 1), opposite=other)


def label_of(value: Any, name: str) -> float:
    """1 or 0 out of true, 1, "yes" and their opposites.

    Raises:
        ValueError: anything else.
    """
    key = value.strip().lower() if isinstance(value, str) else value
    if isinstance(key, (bool, int, float, str)) and key in LABELS:
        return LABELS[key]
    raise ValueError(
        f"{name!r}: got {value!r}, expected true or false, 1 or 0, yes or no, up or down; correct the row"
    )


def _read_steps(row: Row, encoder: Encoder, config: RewardDataConfig, source: str) -> Reading[Judgement]:
    messages, steps, labels = encoder.messages(row), column(row, "steps"), column(row, "step_labels")
    if not isinstance(steps, list) or not isinstance(labels, list) or not steps or len(steps) != len(labels):
        sizes = [len(part) if isinstance(part, list) else type(part).__name__ for part in (steps, labels)]
        raise ValueError(
            f"got steps {sizes[0]} and step_labels {sizes[1]}, expected two lists of one length; correct the row"
        )
    texts = [text_of(step, "steps").strip() for step in steps]
    targets = [number(label, "step_labels", low=0.0, high=1.0) for label in labels]
    answer = config.step_separator.join(texts)
    encoded = encoder.answers(messages, [answer])
    answer_ids = encoded.answer_ids[0]
    ends = step_ends(encoder.tokenizer, answer_ids, texts, config.step_separator)
    if not ends:
        raise TooLong(
            f"got a first step that does not fit into data.max_tokens={config.max_tokens}, expected one at least; "
            "raise it or remove the row"
        )
    if "truncated" not in encoded.told:
        ends[-1] = len(answer_ids) - 1
    record = SteppedAnswer(
        id=digest("\0".join([prompt_id(messages), answer])),
        prompt_ids=encoded.prompt_ids,
        answer_ids=answer_ids,
        step_ends=tuple(ends),
        targets=tuple(targets[: len(ends)]),
        source=source,
    )
    return _reading(record, row, messages, encoded)


def step_ends(
    tokenizer: PreTrainedTokenizerBase, answer_ids: Sequence[int], steps: Sequence[str], separator: str
) -> list[int]:
    """Positions of the tokens in which the steps end, of those that are whole in `answer_ids`.

    The answer is tokenised as a whole, as at scoring; a step ends in the first token after which its text is there.

    Raises:
        ValueError: two steps end in one token; a text that the tokenizer does not give back.
    """
    ends: list[int] = []
    done = ""
    for step in steps:
        done += (separator if done else "") + step
        low, high = 0, len(answer_ids)
        while low < high:
            middle = (low + high) // 2
            if decode(tokenizer, answer_ids[: middle + 1]).startswith(done):
                high = middle
            else:
                low = middle + 1
        if low == len(answer_ids):
            break
        if ends and ends[-1] == low:
            raise ValueError(
                f"'steps': got two that end in one token with data.step_separator={separator!r}, expected a token "
                "at least for each; use another separator"
            )
        ends.append(low)
    whole = decode(tokenizer, answer_ids)
    if len(ends) < len(steps) and not done.startswith(whole.rstrip("\ufffd")):
        raise ValueError(
            "'steps': got text that the tokenizer does not give back, expected plain text; remove the row"
        )
    return ends


def _reading(
    record: J, row: Row, messages: Messages, encoded: Encoded, told: tuple[str, ...] = (), opposite: str | None = None
) -> Reading[J]:
    return Reading(
        record=record,
        group=group_of(row, messages),
        whole_prompt=encoded.whole_prompt,
        opposite=opposite,
        told=encoded.told + told,
    )


Reader = Callable[[Row, Encoder, RewardDataConfig, str], Reading[Judgement]]
READERS: Mapping[str, Reader] = {
    "pairs": _read_pair,
    "rankings": _read_ranking,
    "ratings": _read_rating,
    "labels": _read_label,
    "steps": _read_steps,
}
COUNTS: Mapping[str, tuple[str, ...]] = {
    "pairs": PAIR_COUNTS,
    "rankings": ("truncated", "ties"),
    "ratings": ("truncated", "split_raters"),
    "labels": ("truncated", "contradictory", "positive"),
    "steps": ("truncated",),
}

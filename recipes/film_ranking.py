"""Films ranked for people: who is asked, by whose scores, and the table of a language model beside baselines."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alignment.candidates import encode_candidates, implicit_rewards
from alignment.config import AdapterConfig, FilmsConfig, ModelConfig
from alignment.data.cache import cache_dir
from alignment.data.chat import question
from alignment.data.movielens import LIKED, SHOWN, MovieLens, movielens, read_movielens
from alignment.data.recommendation_cases import RecommendationCase, recommendation_cases
from alignment.data.split import digest
from alignment.fingerprint import records_fingerprint
from alignment.interfaces import Pending
from alignment.recommendation_baselines import ItemNeighbours
from alignment.recommendation_metrics import chance
from alignment.recommendation_report import CaseScores, case_metrics, gains, means, scores_by
from alignment.reference_cache import cached_numbers
from alignment.shared_prompts import Group

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOLD_EVERY = 16
"""People, between lines on the screen."""
FIRST = 10
"""The k of hit rate and NDCG."""
RIVALS = ("popularity", "item neighbours of those in the prompt")
"""Baselines that leads are measured from: one that knows nobody, and one that knows what the model is shown."""
BESIDE = "last method beside "
Scores = Sequence[CaseScores]
Told = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Asked:
    """One person's question and all candidates, as the cache of reference numbers takes it."""

    prompt_ids: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]

    @property
    def sequences(self) -> tuple[tuple[int, ...], ...]:
        return tuple(self.prompt_ids + answer for answer in self.answers)

    @property
    def group(self) -> Group:
        return self.prompt_ids, self.answers


def film_table(config: FilmsConfig) -> MovieLens:
    """The table, without its test part where `early` says so.

    Raises:
        ValueError: files that are not there or broken, or no training part.
    """
    if config.folder is None:
        data = movielens()
    else:
        folder = Path(config.folder).expanduser()
        tables = [folder / name for name in ("ml-100k.inter", "ml-100k.item")]
        for table in tables:
            if not table.is_file():
                raise ValueError(
                    f"films.folder: got {folder} without {table.name}, expected both tables; correct the path"
                )
        data = read_movielens(*tables, num_test=config.num_test)
    if config.early and len(data.train) <= config.num_test:
        raise ValueError(
            f"films.num_test: got {config.num_test} with films.early and {len(data.train)} ratings before those, "
            "expected more of them; lower it"
        )
    return data.without_test(config.num_test) if config.early else data


def asked_cases(config: FilmsConfig, data: MovieLens, after: Mapping[int, int] | None) -> list[RecommendationCase]:
    """Of whom is asked, in the order of persons. `after`: as for `recommendation_cases`.

    Raises:
        ValueError: more people than there are, or nobody.
    """
    cases = recommendation_cases(data, num_negatives=config.num_negatives, after=after)
    if not cases:
        raise ValueError(
            f"films.num_test: got {config.num_test}, whose ratings have nobody to ask about, expected likes behind "
            "three others; lower films.choices_per_person, or raise films.num_test of a table of your own"
        )
    wanted = len(cases) if config.num_people is None else config.num_people
    if wanted > len(cases):
        raise ValueError(
            f"films.num_people: got {wanted}, expected at most the {len(cases)} who can be asked about; lower it"
        )
    chosen = set(sorted((case.user for case in cases), key=lambda user: digest(str(user)))[:wanted])
    return [case for case in cases if case.user in chosen]


@dataclass(frozen=True, kw_only=True)
class FilmRanking:
    """The questions, encoded, and what is made of the answers."""

    data: MovieLens
    cases: Sequence[RecommendationCase]
    asked: Sequence[Asked]
    beta: float
    row_tokens: int
    seed: int
    made_of: Mapping[str, str] = field(default_factory=dict)
    """What changes a model's scores beside the model."""

    @property
    def inputs(self) -> dict[str, str]:
        return {"films": records_fingerprint([*self.cases, *self.asked])}

    def in_words(self) -> str:
        titles = sum(len(asked.answers) for asked in self.asked)
        return f"films: {len(self.cases)} people are asked about, {titles} titles in all"

    def scores(
        self, ask: Callable[..., Pending[list[list[float]]]], tell: Told, *, what: str, asked: Sequence[Asked] = ()
    ) -> list[list[float]]:
        """Log-probabilities of the films of every case, from a handle's method; some people at a time.

        `asked`: others than all."""
        everybody = list(asked or self.asked)
        found: list[list[float]] = []
        for start in range(0, len(everybody), TOLD_EVERY):
            groups = [one.group for one in everybody[start : start + TOLD_EVERY]]
            found += ask(groups, row_tokens=self.row_tokens).result()
            tell(f"films: {len(found)} of {len(everybody)} people, {what}")
        return found

    def kept_scores(
        self, ask: Callable[..., Pending[list[list[float]]]], tell: Told, *, what: str, model: str
    ) -> list[list[float]]:
        """The same of a model that stays, kept on disk for a later start and for other runs.

        `model`: its fingerprint."""

        def compute(records: list[Asked]) -> list[list[float]]:
            return self.scores(ask, tell, what=what, asked=records)

        made_of = {**self.made_of, "kind": "films", "model": model, "row_tokens": str(self.row_tokens)}
        numbers, line = cached_numbers(cache_dir() / "reference", made_of, self.asked, compute)
        tell(line)
        return numbers(self.asked)

    def implicit(self, scores: Scores, base: Scores) -> list[list[float]]:
        """The implicit reward of each film."""
        pairs = zip(scores, base, strict=True)
        return [implicit_rewards(_row(own), _row(ref), beta=self.beta).tolist() for own, ref in pairs]

    def metrics(self, scores: Scores) -> dict[str, Tensor]:
        return case_metrics(self.cases, scores, k=FIRST)

    def table(self, before: Scores, after: Scores, base: Scores) -> dict[str, dict[str, Any]]:
        """Rows of `held_out`: `implicit/PROTOCOL/METRIC` and `likelihood/PROTOCOL/METRIC`.

        Args:
            base: of the model that implicit rewards are measured from. They are ties where `before` is of that model.
        """
        told = {
            "implicit": (self.implicit(before, base), self.implicit(after, base)),
            "likelihood": (before, after),
        }
        return {
            f"{name}/{metric}": row
            for name, (first, last) in told.items()
            for metric, row in gains(self.cases, self.metrics(first), self.metrics(last), seed=self.seed).items()
        }

    @cached_property
    def baselines(self) -> dict[str, dict[str, Tensor]]:
        """Metrics of each case by what knows the training part alone."""
        popularity = self.data.train_likes()
        likes = [(rating.user, rating.item) for rating in self.data.train if rating.stars >= LIKED]
        neighbours = ItemNeighbours(likes)
        own = {
            "popularity": lambda liked, films: [float(popularity[film]) for film in films],
            "item neighbours of all that was liked": neighbours.scores,
            RIVALS[1]: lambda liked, films: neighbours.scores(liked[-SHOWN:], films),
        }
        return {name: self.metrics(scores_by(score, self.cases)) for name, score in own.items()}

    def beside(self, methods: Mapping[str, Scores]) -> dict[str, Any]:
        """What the summary has as `films`: each method's means over people, the baselines' among them, and how far
        the last method is from each of `RIVALS` on the same candidates."""
        hit, ndcg = chance(len(self.cases[0].uniform) + 1, k=FIRST)
        measured = {**self.baselines, **{name: self.metrics(scores) for name, scores in methods.items()}}
        random_order = {name: hit if name.endswith("hit_rate") else ndcg for name in next(iter(measured.values()))}
        return {
            "people": len(self.cases),
            "methods": {
                "random order": random_order,
                **{name: means(self.cases, own) for name, own in measured.items()},
            },
            **{
                BESIDE + rival: gains(self.cases, measured[rival], list(measured.values())[-1], seed=self.seed)
                for rival in RIVALS
            },
        }

    def save(self, path: Path, **scores: Scores) -> None:
        """Write down who was asked about what, and every score of the films in their order."""
        from alignment.checkpoint import save_json

        rows = [
            {**asdict(case), "films": case.films, **{name: list(own[i]) for name, own in scores.items()}}
            for i, case in enumerate(self.cases)
        ]
        save_json(path, rows)


def make_ranking(
    config: FilmsConfig,
    data: MovieLens,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model: ModelConfig,
    adapter: AdapterConfig,
    after: Mapping[int, int] | None,
    beta: float,
    seed: int,
    system_prompt: str | None,
    max_tokens: int,
    eos_ids: frozenset[int],
) -> FilmRanking:
    """Choose who is asked and encode it.

    Raises:
        ValueError: too few people or films, or a title beyond `max_tokens` with its prompt.
    """
    cases = asked_cases(config, data, after)
    asked = []
    for case in cases:
        messages = question(case.prompt(data), system_prompt)
        titles = [data.titles[film] for film in case.films]
        prompt, answers = encode_candidates(tokenizer, messages, titles, eos_ids=eos_ids)
        longest = len(prompt) + max(map(len, answers))
        if longest > max_tokens:
            raise ValueError(
                f"data.max_tokens: got {max_tokens}, expected at least the {longest} of a prompt and a title that "
                "person is asked about; raise it"
            )
        asked.append(Asked(tuple(prompt), tuple(map(tuple, answers))))
    made_of = {key: str(getattr(model, key)) for key in ("dtype", "attention", "batch_layout")}
    return FilmRanking(
        data=data,
        cases=cases,
        asked=asked,
        beta=beta,
        row_tokens=config.row_tokens,
        seed=seed,
        # Behind an adapter of virtual tokens no prompt is shared, so that titles are laid out in other rows.
        made_of={**made_of, "quantization": adapter.quantization, "adapter": adapter.type},
    )


def methods_table(films: Mapping[str, Any]) -> str:
    """`FilmRanking.beside` for the screen."""
    columns = list(next(iter(films["methods"].values())))
    lines = [f"{'films':<42}" + "".join(f"{name:>18}" for name in columns)]
    for method, row in films["methods"].items():
        lines.append(f"{method:<42}" + "".join(f"{row[name]:>18.3f}" for name in columns))
    for name, row in films.items():
        if name.startswith(BESIDE):
            intervals = [row[column]["gain_ci95"] for column in columns]
            lines.append(f"what the last one gains over {name.removeprefix(BESIDE)}:")
            lines.append(f"{'95 % interval':<42}" + "".join(map(_interval, intervals)))
    return "\n".join(lines)


def some_of(count: int, most: int, name: str) -> list[int]:
    """Up to `most` of the first `count` numbers, in order; which ones goes by `name` alone."""
    return sorted(random.Random(name).sample(range(count), min(most, count)))


def _interval(bounds: Sequence[float]) -> str:
    return f"{bounds[0]:+.3f}..{bounds[1]:+.3f}".rjust(18)


def _row(scores: CaseScores) -> Tensor:
    return torch.tensor(scores, dtype=torch.float64)

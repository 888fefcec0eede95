"""Which models rank films: the one that learns, and the one that it was made from."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actors.build import dpo_actors, preference_role
from actors.handles import PreferenceHandle
from alignment.config import FilmsConfig, LiveRunConfig, RecommenderRunConfig
from alignment.config.recommender import LATE_ASSETS
from alignment.config_io import read_yaml
from alignment.data.chat import load_tokenizer
from alignment.data.movielens import MovieLens
from alignment.fingerprint import model_fingerprint
from alignment.interfaces import Pending
from alignment.loops.run import Run
from alignment.model_checks import check_model
from recipes import checks, common
from recipes.film_ranking import FilmRanking, Scores, make_ranking, methods_table

RUN_FILES = ("config.yaml", "inputs.json")
"""What tells the directory of a run from others."""

Job = common.Job[Any]
"""Of a `RecommenderRunConfig` or a `LiveRunConfig`."""


def ranking_of(
    config: RecommenderRunConfig | LiveRunConfig,
    data: MovieLens,
    model: checks.Trainee,
    *,
    base: str | None,
    after: Mapping[int, int] | None,
) -> FilmRanking:
    """Who is asked about what, in the ids of the model that learns.

    Args:
        base: the model that it was made from, if another one: it is asked in the same ids.

    Raises:
        ValueError: as `make_ranking`, or a base that spells titles otherwise or cannot be asked.
    """

    def asked_by(tokenizer: Any) -> FilmRanking:
        return make_ranking(
            config.films,
            data,
            tokenizer,
            model=config.model,
            adapter=config.training.adapter,
            after=after,
            beta=config.dpo.beta,
            seed=config.run.seed,
            system_prompt=config.data.system_prompt,
            max_tokens=config.data.max_tokens,
            eos_ids=model.eos_ids,
        )

    ranking = asked_by(model.tokenizer)
    if base is not None:
        tokenizer = load_tokenizer(base)
        check_model("base", config.model.at(base, None), tokenizer, config.training.adapter)
        if asked_by(tokenizer).asked != ranking.asked:
            raise ValueError(
                f"base: got {config.base}, whose tokenizer spells titles otherwise than that of {config.model.path}, "
                "expected the model that it was trained from; name that one"
            )
    return ranking


def base_scores(job: Job, ranking: FilmRanking, base: str, run: Run) -> list[list[float]]:
    """What the model in the folder `base` says of the films: out of the cache, where another run has left it, or from
    actors of its own, which then make room."""
    with contextlib.ExitStack() as stack:
        opened: list[PreferenceHandle] = []

        def ask(*args: Any, **kwargs: Any) -> Pending[list[list[float]]]:
            if not opened:
                config = job.config.model_copy(update={"model": job.config.model.at(base, None)})
                opened.append(
                    preference_role(stack.enter_context(job.groups(dpo_actors(config, job.cluster, model_path=base))))
                )
            return opened[0].ref_candidate_logps(*args, **kwargs)

        return ranking.kept_scores(ask, run.progress.message, what="base", model=model_fingerprint(base))


class RankedFilms:
    """A ranking as a run on pairs asks for it: by the model that it was made from before, by the policy after."""

    def __init__(self, job: Job, ranking: FilmRanking, *, base: str | None) -> None:
        """`base`: the folder of another model than the run begins with, or None."""
        self.ranking = ranking
        self._job, self._base_path = job, base
        self._base: Scores = ()
        self._films: dict[str, Any] = {}

    @property
    def inputs(self) -> Mapping[str, str]:
        base = {} if self._base_path is None else {"base": model_fingerprint(self._base_path)}
        return {**self.ranking.inputs, **base}

    def in_words(self) -> str:
        return self.ranking.in_words()

    def prepare(self, run: Run) -> None:
        if self._base_path is not None:
            self._base = base_scores(self._job, self.ranking, self._base_path, run)

    def before(self, policy: PreferenceHandle, run: Run, *, model: str) -> None:
        """The policy is the reference until its first step, so one model's scores are both's."""
        if self._base_path is None:
            self._base = self.ranking.kept_scores(
                policy.ref_candidate_logps, run.progress.message, what="before", model=model
            )

    def after(self, policy: PreferenceHandle, run: Run) -> dict[str, dict[str, Any]]:
        ranking, base, tell = self.ranking, self._base, run.progress.message
        after = ranking.scores(policy.candidate_logps, tell, what="after")
        ranking.save(run.directory.path / "films.json", before=base, after=after)
        methods = {
            "untrained, log-probability": base,
            "trained, implicit reward": ranking.implicit(after, base),
            "trained, log-probability": after,
        }
        self._films = ranking.beside(methods)
        tell(methods_table(self._films))
        return ranking.table(base, after, base)

    def told(self) -> Mapping[str, Any]:
        return {"films": self._films}


def refuse_late_data(path: str, films: FilmsConfig) -> None:
    """Refuse a model that was trained on what people are asked about: by its run's config, and those of the runs whose
    models that one began with. Of a table of one's own nobody knows which of its tests the packaged assets tell.

    Raises:
        ValueError: naming the run.
    """
    refused: Mapping[str, str]
    if films.folder is not None:
        refused = dict.fromkeys([*LATE_ASSETS, *LATE_ASSETS.values()], "files of films.folder's table")
    else:
        refused = LATE_ASSETS if films.early else {}
    seen: set[Path] = set()
    model = path
    while (run := _run_of(model)) and run not in seen:
        seen.add(run)
        config = read_yaml(run / "config.yaml")
        if (config.get("live") or {}).get("replay") and (films.early or films.folder is not None):
            raise ValueError(
                f"model.path: got {path}, which learnt from replayed choices in the run in {run}, expected a model "
                "that knows nothing of the films that people are asked about, and they may be among those; name the "
                "model that run began with"
            )
        data = config.get("data") or {}
        sources = [*(data.get("sources") or []), data.get("source") or {}]
        for late in sorted({source.get("asset") for source in sources} & set(refused)):
            raise ValueError(
                f"model.path: got {path}, trained on {late} by the run in {run}, expected a model that knows nothing "
                f"of the films that people are asked about; name one whose runs read {refused[late]}"
            )
        model = (config.get("model") or {}).get("path") or ""


def _run_of(model: str) -> Path | None:
    """The directory of the run that a model lies in, as `final` or in a checkpoint; links are followed."""
    folder = Path(model).expanduser().resolve()
    of_runs = (parent for parent in folder.parents if all((parent / name).is_file() for name in RUN_FILES))
    return next(of_runs, None)

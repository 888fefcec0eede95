"""DPO on pairs of film titles: `python recipes/dpo_recommender.py`.

"I liked these films: ... Which film should I watch next?" A pair is the film that a person liked next against another
one. The table has where the film that a person liked later stands among 100, before and after, beside popularity and
item neighbours; docs/recommender.md says how to read it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alignment.config import RecommenderRunConfig
from alignment.data.model_assets import resolve_model
from alignment.data.movielens_live import live_choices
from recipes import checks, common
from recipes.film_models import RankedFilms, ranking_of, refuse_late_data
from recipes.film_ranking import film_table
from recipes.preference_tuning import run_dpo


def run_recommender(job: common.Job[RecommenderRunConfig]) -> None:
    """A run on pairs that ranks films before and after."""
    run_dpo(job, ranked_films)


def ranked_films(job: common.Job[RecommenderRunConfig], model: checks.Trainee) -> RankedFilms:
    """The questions of this config, checked."""
    config, films = job.config, job.config.films
    data = film_table(films)
    checks.check_answering(job)
    refuse_late_data(config.model.path, films)
    base = None if config.base is None else resolve_model(config.base, None)
    after = live_choices(data, per_user=films.choices_per_person)[1] if films.early else None
    return RankedFilms(job, ranking_of(config, data, model, base=base, after=after), base=base)


def main(argv: list[str] | None = None) -> int:
    return common.run_recipe("dpo_recommender", RecommenderRunConfig, run_recommender, argv)


if __name__ == "__main__":
    sys.exit(main())

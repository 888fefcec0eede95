"""What the recommender's recipes are made of: titles scored through actors, who is asked, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_films import films_config, table_of, write_recommender

from actors.build import dpo_actors, preference_role
from actors.launch import local_groups
from alignment import models
from alignment.candidates import candidate_logps
from alignment.config import (
    AdapterConfig,
    ClusterConfig,
    DpoRunConfig,
    FilmsConfig,
    LiveRunConfig,
    ModelConfig,
    RecommenderRunConfig,
)
from alignment.config_io import dump_config, load_config
from alignment.data.chat import eos_ids_of_model, load_tokenizer
from alignment.data.movielens import LIKED, NUM_TEST
from alignment.data.movielens_live import live_choices
from alignment.recommendation_baselines import ItemNeighbours
from alignment.recommendation_metrics import hit_rate_at_k
from alignment.types import PreferencePair
from recipes.checks import Trainee
from recipes.film_models import refuse_late_data
from recipes.film_ranking import asked_cases, film_table, make_ranking, methods_table
from recipes.live_learning import Start


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    return write_recommender(tmp_path_factory.mktemp("recommender"), tiny / "policy")


@pytest.fixture(scope="module")
def ranking(folder, tiny):
    path, config = str(tiny / "policy"), films_config(folder, num_people=3, row_tokens=700)
    tokenizer = load_tokenizer(path)
    return make_ranking(
        config,
        film_table(config),
        tokenizer,
        model=ModelConfig(path=path),
        adapter=AdapterConfig(),
        after=None,
        beta=0.2,
        seed=1,
        system_prompt=None,
        max_tokens=200,
        eos_ids=eos_ids_of_model(tokenizer, path),
    )


@pytest.mark.parametrize("share", [True, False])
def test_titles_scored_through_actors(folder, tiny, ranking, share):
    """The policy's numbers move with it, the reference's are those of the model that it began as, bit for bit."""
    path = str(tiny / "policy")
    settings = ["--data.held_out", "0", "--dpo.share_prompts", str(share).lower()]
    config = load_config(RecommenderRunConfig, file=folder / "offline.yaml", overrides=settings)
    start = models.load_causal_lm(path)
    groups = [one.group for one in ranking.asked]
    expected = [candidate_logps(start, group, share_prompt=True, row_tokens=700).tolist() for group in groups]
    with local_groups(dpo_actors(config, ClusterConfig(), model_path=path), ClusterConfig()) as opened:
        policy = preference_role(opened)
        assert policy.candidate_logps(groups, row_tokens=700).result() == expected
        prompt, answers = groups[0]
        pair = PreferencePair(id="a", prompt_ids=prompt, chosen_ids=answers[0], rejected_ids=answers[1], source="own")
        for step in range(2):  # an adapter moves with its second matrix
            policy.update([pair], policy.ref_logps([pair]).result(), step=step).result()
        after = policy.candidate_logps(groups, row_tokens=700).result()
        assert policy.ref_candidate_logps(groups, row_tokens=700).result() == expected
    assert all(ours != theirs for ours, theirs in zip(after, expected, strict=True))
    assert after[0][0] > expected[0][0]


def test_scores_come_in_the_order_of_people_and_once(ranking, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYLIGN_CACHE", str(tmp_path))
    asked = []

    class Answer:
        def __init__(self, groups):
            self.groups = groups

        def result(self):
            return [[float(sum(answer)) for answer in answers] for _, answers in self.groups]

    def ask(groups, *, row_tokens):
        asked.append((len(groups), row_tokens))
        return Answer(groups)

    told: list[str] = []
    expected = [[float(sum(answer)) for answer in one.answers] for one in ranking.asked]
    for _ in range(2):
        assert ranking.kept_scores(ask, told.append, what="before", model="m") == expected
    assert asked == [(3, 700)]
    ranking.kept_scores(ask, told.append, what="before", model="another")
    replace(ranking, row_tokens=100).kept_scores(ask, told.append, what="before", model="m")
    replace(ranking, made_of={**ranking.made_of, "dtype": "bfloat16"}).kept_scores(
        ask, told.append, what="before", model="m"
    )
    assert asked == [(3, 700), (3, 700), (3, 100), (3, 700)]


def test_implicit_rewards_of_the_reference_are_all_ties(ranking):
    base = [[float(i) for i in range(len(case.films))] for case in ranking.cases]
    better = [[1.0 + own[0], *own[1:]] for own in base]
    rows = ranking.table(base, better, base)
    assert set(rows) == {
        f"{kind}/{protocol}/{metric}"
        for kind in ("implicit", "likelihood")
        for protocol in ("uniform", "popular")
        for metric in ("hit_rate", "ndcg")
    }
    # Of 15 candidates of one score the right one is among the first ten two times of three.
    assert rows["implicit/uniform/hit_rate"]["before"] == pytest.approx(10 / 15)
    assert rows["implicit/uniform/hit_rate"]["after"] == 1
    assert rows["likelihood/popular/hit_rate"]["after"] == 0
    films = ranking.beside({"ours": better})
    assert films["methods"]["random order"]["uniform/hit_rate"] == pytest.approx(10 / 15)
    popularity = ranking.data.train_likes()
    own = [[float(popularity[film]) for film in case.candidates("popular")] for case in ranking.cases]
    table = torch.tensor(own, dtype=torch.float64)
    expected = float(hit_rate_at_k(table[:, 0], table[:, 1:], k=10).mean())
    assert films["methods"]["popularity"]["popular/hit_rate"] == pytest.approx(expected)


def test_baselines_know_the_training_part_alone(folder, ranking):
    """Each by numbers of its own; with the likes of the test part they are others."""
    data = table_of(folder / "tables")
    likes = [[(r.user, r.item) for r in part if r.stars >= LIKED] for part in (data.train, data.train + data.test)]
    train, both = map(ItemNeighbours, likes)
    everybody = replace(ranking, cases=asked_cases(films_config(folder), data, None))

    def by(known: ItemNeighbours, most: int) -> list[list[float]]:
        return [list(known.scores(case.liked[-most:], case.films)) for case in everybody.cases]

    for name, most in (("item neighbours of all that was liked", 99), ("item neighbours of those in the prompt", 5)):
        expected = everybody.metrics(by(train, most))
        assert all(torch.equal(everybody.baselines[name][metric], own) for metric, own in expected.items())
    assert by(train, 99) != by(both, 99)
    assert by(train, 99) != by(train, 5)


def test_the_lead_is_told_with_whom_it_is_over(ranking):
    """However the baselines stand: the name, the numbers and the line on the screen are of one."""
    ours = [[float(i == 0) for i in range(len(case.films))] for case in ranking.cases]
    films = ranking.beside({"another": [[0.0] * len(own) for own in ours], "ours": ours})
    lines = methods_table(films).splitlines()[-4:]
    for i, rival in enumerate(("popularity", "item neighbours of those in the prompt")):
        lead = films[f"last method beside {rival}"]
        for name, row in lead.items():
            assert (row["before"], row["after"]) == (films["methods"][rival][name], films["methods"]["ours"][name])
        assert lines[2 * i] == f"what the last one gains over {rival}:"
        bounds = [f"{row['gain_ci95'][0]:+.3f}..{row['gain_ci95'][1]:+.3f}" for row in lead.values()]
        assert lines[2 * i + 1].removeprefix("95 % interval").split() == bounds


@pytest.mark.parametrize(
    ("config", "sections", "said"),
    [
        (RecommenderRunConfig, {"films": {"num_test": 20_000}}, "films.num_test: got 20000 of the packaged table"),
        (LiveRunConfig, {"films": {"early": True, "num_test": 9_999}}, "films.num_test: got 9999 of the packaged"),
        (LiveRunConfig, {"films": {"early": False}}, "films.early: got false in a run that learns from choices"),
        (LiveRunConfig, {"films": {"num_people": 5}}, "films.early: got false"),
        (
            RecommenderRunConfig,
            {"films": {"early": True}, "data": {"sources": [{"asset": "movielens-pairs"}]}},
            "data.sources: got asset movielens-pairs with films.early, expected movielens-early-pairs",
        ),
        (
            RecommenderRunConfig,
            {"films": {"folder": "own"}, "data": {"sources": [{"asset": "movielens-early-pairs"}]}},
            "data.sources: got asset movielens-early-pairs with films.folder, expected pairs of that folder's table",
        ),
        (
            RecommenderRunConfig,
            {"reference": {"sync_every": 5}},
            "reference.sync_every: got 5 without base, expected none",
        ),
    ],
)
def test_numbers_that_would_not_be_what_they_are_called_are_refused(config, sections, said):
    with pytest.raises(ValueError) as error:
        config.model_validate(sections)
    assert said in str(error.value)
    assert FilmsConfig(folder="own", num_test=20_000).num_test == 20_000
    assert FilmsConfig().num_test == NUM_TEST


def test_who_is_asked(folder):
    data = table_of(folder / "tables")
    everybody = asked_cases(films_config(folder), data, None)
    some = asked_cases(films_config(folder, num_people=5), data, None)
    fewer = asked_cases(films_config(folder, num_people=4), data, None)
    assert len(some) == 5
    assert [case for case in everybody if case in some] == some
    assert {case.user for case in fewer} < {case.user for case in some}
    early = film_table(films_config(folder, early=True))
    assert early.test == data.train[-90:]
    assert not {(r.user, r.item) for r in early.train + early.test} & {(r.user, r.item) for r in data.test}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"num_people": 18}, "films.num_people: got 18, expected at most the 17"),
        ({"folder": "/nowhere"}, "films.folder: got /nowhere without ml-100k.inter"),
        ({"num_test": 1, "after": {}}, "films.num_test: got 1, whose ratings have nobody"),
        ({"num_test": 300, "early": True}, "films.num_test: got 300 with films.early and 40 ratings"),
        ({"num_negatives": 50}, "lower films.num_negatives"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused(folder, changes, fault):
    after = changes.pop("after", None)
    config = films_config(folder, **changes)
    with pytest.raises(ValueError, match=fault):
        asked_cases(config, film_table(config), after)


def test_a_model_that_was_trained_on_the_answers_is_refused(tmp_path):
    """By the run beside it, or by the one that this run's model came from."""

    def run_of(name: str, model: str, **source: str) -> str:
        folder = tmp_path / name / "final"
        folder.mkdir(parents=True)
        config = DpoRunConfig.model_validate({"model": {"path": model}, "data": {"sources": [source]}})
        (folder.parent / "config.yaml").write_text(dump_config(config))
        (folder.parent / "inputs.json").write_text("{}")
        return str(folder)

    early = run_of("early", "asset:smollm2-135m-instruct", asset="movielens-early-pairs")
    late = run_of("late", early, asset="movielens-pairs")
    later = run_of("later", late, path="own.jsonl")
    for path in (
        early,
        "org/name",
        str(tmp_path / "final"),
        run_of("itself", str(tmp_path / "itself" / "final"), path="x"),
    ):
        refuse_late_data(path, FilmsConfig(early=True))
    told = run_of("told", "asset:smollm2-135m-instruct", asset="movielens-histories")
    from_told = run_of("from_told", told, asset="movielens-early-pairs")
    checkpoint = tmp_path / "late" / "checkpoints" / "step_000010" / "policy"
    checkpoint.mkdir(parents=True)
    (tmp_path / "link").symlink_to(late)
    for path, by, asset in (
        (late, "late", "pairs"),
        (str(checkpoint), "late", "pairs"),
        (str(tmp_path / "link"), "late", "pairs"),
        (later, "late", "pairs"),
        (told, "told", "histories"),
        (from_told, "told", "histories"),
    ):
        said = f"model.path: got {path}, trained on movielens-{asset} by .*{tmp_path}/{by},.* movielens-early-{asset}"
        with pytest.raises(ValueError, match=said):
            refuse_late_data(path, FilmsConfig(early=True))
        refuse_late_data(path, FilmsConfig())
    for name, replay in (("replayed", True), ("used", False)):
        live = run_of(name, early, path="own.jsonl")
        config = LiveRunConfig.model_validate({"model": {"path": early}, "live": {"replay": replay, "port": 0}})
        (tmp_path / name / "config.yaml").write_text(dump_config(config))
        refuse_late_data(live, FilmsConfig())
        if replay:
            with pytest.raises(ValueError, match=f"learnt from replayed choices in the run in {tmp_path}/replayed"):
                refuse_late_data(live, FilmsConfig(early=True))
        else:
            refuse_late_data(live, FilmsConfig(early=True))
    with pytest.raises(ValueError, match=r"trained on movielens-early-pairs .* expected .* files of films\.folder's"):
        refuse_late_data(early, FilmsConfig(folder="own", num_test=9))


def start_of(ranking, replayed=(), **sections) -> Start:
    config = LiveRunConfig.model_validate(sections)
    trainee = Trainee(path="org/name", tokenizer=None, eos_ids=frozenset(), num_parameters=1)
    return Start(
        job=SimpleNamespace(config=config),
        model=trainee,
        base_path="b",
        ranking=ranking,
        replayed=replayed,
        pairs=None,
    )


def test_another_revision_is_another_model(ranking):
    first, other = (start_of(ranking, model={"path": "org/name", "revision": revision}) for revision in "ab")
    assert first.inputs["model"] != other.inputs["model"]


@pytest.mark.parametrize(
    ("live", "num_steps", "steps"),
    [
        ({"replay": True}, 1000, 6),
        ({"replay": True}, 3, 3),
        ({"replay": True, "port": 0}, 1000, 1000),
        ({"replay": True, "file": "choices.jsonl"}, 1000, 1000),
    ],
)
def test_a_run_ends_where_nothing_more_can_come(ranking, choices, live, num_steps, steps):
    """Of 19 choices, three a step, one waits for others that nobody makes."""
    assert len(choices) == 19
    start = start_of(ranking, choices, live=live, run={"num_steps": num_steps}, training={"choices_per_step": 3})
    assert start.num_steps == steps


@pytest.fixture(scope="module")
def choices(folder):
    return live_choices(table_of(folder / "tables").without_test(90), per_user=1)[0]

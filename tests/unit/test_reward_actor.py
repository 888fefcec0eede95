"""What scores: standardised, with the columns of the data, and None where it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import byte_tokenizer, tiny_config, write_tiny_reward_model

from actors.reward import RewardModelActor
from actors.reward_training import write_statistics
from alignment.config import ModelConfig, RewardConfig
from alignment.data.prompts import make_prompt
from alignment.types import Rollout

LENGTH = "text:length_between"
STARTED: list[RewardModelActor] = []


def actor_of(**reward: object) -> RewardModelActor:
    actor = RewardModelActor(model=ModelConfig(), reward=RewardConfig.model_validate(reward))
    STARTED.append(actor)
    actor.setup({})
    return actor


@pytest.fixture(autouse=True)
def _no_process_is_left():
    yield
    while STARTED:
        STARTED.pop().close()


def rollout(response: str, **columns: object) -> Rollout:
    prompt = make_prompt(byte_tokenizer(), [{"role": "user", "content": "How?"}], columns)
    return Rollout(
        prompt=prompt,
        sample_index=0,
        response_ids=(5, 6, 7),
        rollout_logprobs=(-1.0, -1.0, -1.0),
        finish_reason="stop",
        response=response,
        weight_version=0,
    )


def test_scores_are_multiples_of_the_saved_deviation(tmp_path):
    folder = write_tiny_reward_model(tmp_path / "judge")
    answers = [rollout("Rest."), rollout("Walk more.")]
    raw = [score.total for score in actor_of(model=str(folder)).score(answers)]
    saved = write_statistics(folder, [1.0, 3.0, 8.0])
    assert (saved["mean"], saved["std"]) == (4.0, pytest.approx((26 / 3) ** 0.5))
    scaled = [score.total for score in actor_of(model=str(folder)).score(answers)]
    assert scaled == pytest.approx([(score - 4.0) / saved["std"] for score in raw])
    assert [s.total for s in actor_of(model=str(folder), standardize_model=False).score(answers)] == raw


def test_statistics_of_one_answer_are_refused(tmp_path):
    folder = write_tiny_reward_model(tmp_path / "judge")
    write_statistics(folder, [2.0, 2.0])
    with pytest.raises(ValueError, match=r"score_statistics\.json: got mean 2 and std 0, expected"):
        actor_of(model=str(folder))


def short_judge(folder: Path) -> Path:
    from transformers import AutoModelForSequenceClassification

    config = tiny_config("gpt2", 259)
    config.n_positions, config.num_labels, config.pad_token_id = 64, 1, 2
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_text_longer_than_the_judges_positions_has_no_score(tmp_path):
    """Its own tokenizer decides: three sampled tokens may be a long text to it."""
    actor = actor_of(model=str(short_judge(tmp_path / "judge")))
    alone = actor.score([rollout("Rest.")])[0].total
    assert alone is not None
    among = actor.score([rollout("a" * 60), rollout("Rest."), rollout("b" * 60)])
    assert [score.total for score in among] == [None, pytest.approx(alone, abs=1e-5), None]
    assert [score.total for score in actor.score([rollout("a" * 60)])] == [None]


def test_columns_are_handed_on_and_never_replaced(tmp_path):
    actor = actor_of(functions=[{"name": "exact_match:multiple_choice"}])
    assert [s.total for s in actor.score([rollout("B", answer="B"), rollout("B", answer="C")])] == [1.0, 0.0]
    with pytest.raises(ValueError, match="got a column 'lengths' in the data"):
        actor.score([rollout("B", answer="B", lengths=1)])
    judge = actor_of(model=str(write_tiny_reward_model(tmp_path / "judge")))
    assert judge.score([rollout("B", lengths=1)])[0].total is not None


def test_parts_settings_gates_and_clips_come_from_the_config(tmp_path):
    actor = actor_of(
        model=str(write_tiny_reward_model(tmp_path / "judge")),
        model_weight=0.0,
        functions=[
            {"name": "text:finished_sentence", "gate": True, "weight": 0.25},
            {
                "name": "text:length_between",
                "part": "short",
                "settings": {"min_words": 1, "max_words": 1},
                "weight": 2,
            },
            {"name": LENGTH, "settings": {"min_words": 2}, "clip": [0.0, 0.75]},
        ],
        execution={"num_workers": 2, "samples_per_call": 1},
    )
    scores = actor.score([rollout("Rest."), rollout("Rest"), rollout("Rest well.")])
    assert [score.total for score in scores] == [0.25 + 2.0 + 0.5, 0.0, 0.25 + 0.0 + 0.75]
    assert {name: scores[2].parts[name] for name in ("short", LENGTH)} == {
        "short": 0.0,
        LENGTH: 1.0,
    }
    assert all(score.failures == {} for score in scores)


def test_what_has_no_number_has_a_reason(tmp_path):
    actor = actor_of(
        model=str(short_judge(tmp_path / "judge")),
        functions=[{"name": "exact_match:multiple_choice", "part": "exact"}],
    )
    scores = actor.score([rollout("a" * 60, answer="A"), rollout("B", answer=None), rollout("B", answer="B")])
    assert [dict(score.failures) for score in scores] == [
        {"reward_model": "length: longer than the reward model's positions"},
        {"exact": "none: the function gave no number"},
        {},
    ]
    assert [score.total is None for score in scores] == [True, True, False]


def test_settings_are_checked_before_anything_is_scored():
    with pytest.raises(
        ValueError, match=r"got a setting 'min_word' of text:length_between, .* did you mean 'min_words'"
    ):
        actor_of(functions=[{"name": "text:length_between", "settings": {"min_word": 3}}])

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


def actor_of(**reward: object) -> RewardModelActor:
    actor = RewardModelActor(model=ModelConfig(), reward=RewardConfig.model_validate(reward))
    actor.setup({})
    return actor


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

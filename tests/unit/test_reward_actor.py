"""What scores: standardised, with the columns of the data, and None where it cannot."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny import byte_tokenizer, tiny_config, write_broken_reward_model, write_tiny_reward_model

from actors.reward import RewardModelActor, pool_functions
from actors.reward_training import write_statistics
from alignment.config import ModelConfig, RewardConfig
from alignment.data.prompts import make_prompt
from alignment.scores import score_metrics
from alignment.types import Rollout
from rewards.base import load_function, with_defaults

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
    judge = str(short_judge(tmp_path / "judge"))
    actor = actor_of(model=judge, functions=[{"name": "exact_match:multiple_choice", "part": "exact"}])
    scores = actor.score([rollout("a" * 60, answer="A"), rollout("B", answer=None), rollout("B", answer="B")])
    assert [dict(score.failures) for score in scores] == [
        {"reward_model": f"length: longer than the positions of {judge}"},
        {"exact": "none: the function gave no number"},
        {},
    ]
    assert [score.total is None for score in scores] == [True, True, False]


def test_settings_are_checked_before_anything_is_scored():
    with pytest.raises(
        ValueError, match=r"got a setting 'min_word' of text:length_between, .* did you mean 'min_words'"
    ):
        actor_of(functions=[{"name": "text:length_between", "settings": {"min_word": 3}}])


def test_a_gold_rule_is_not_one_that_is_trained_on():
    """A setting that says what is so by default makes no other rule."""
    trained = {"name": LENGTH, "settings": {"min_words": 1, "max_words": 5}}
    pool_functions(RewardConfig.model_validate({"functions": [trained], "gold": [{"name": LENGTH}]}))
    for gold in (trained, {**trained, "part": "other"}):
        with pytest.raises(ValueError, match=r"reward\.gold: got text:length_between with settings that it has in"):
            pool_functions(RewardConfig.model_validate({"functions": [trained], "gold": [gold]}))
    default = {"name": LENGTH, "settings": {"min_words": with_defaults(load_function(LENGTH), {})["min_words"]}}
    with pytest.raises(
        ValueError, match=r"expected a rule that is not trained on: .*; remove one of the two, or change"
    ):
        pool_functions(RewardConfig.model_validate({"functions": [{"name": LENGTH}], "gold": [default]}))


def test_a_model_that_gives_no_finite_score_is_named(tmp_path):
    good, bad = write_tiny_reward_model(tmp_path / "good"), write_broken_reward_model(tmp_path / "bad")
    actor = actor_of(model=str(good), ensemble={"models": [str(bad)]})
    with pytest.raises(ValueError, match=r"reward model '\S*/bad': got nan as the score of 2 of 2 answers, .*: train"):
        actor.score([rollout("Rest."), rollout("Walk more.")])


def other_tokenizer(folder: Path, seed: int) -> Path:
    """A model that writes every word of an answer as one token of its own vocabulary."""
    import torch
    from tiny import CHATML, SPECIALS
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

    words = [*SPECIALS, "[UNK]", "user", "assistant", "How", "?", "Rest", "Walk", "more", "."]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.add_special_tokens(SPECIALS)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = tiny_config("llama", len(words))
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    return folder


def test_one_member_is_the_model_bitwise_and_so_are_two_copies(tmp_path):
    first = write_tiny_reward_model(tmp_path / "first")
    write_statistics(first, [1.0, 3.0, 8.0])
    shutil.copytree(first, tmp_path / "copy")
    answers = [rollout("Rest."), rollout("Walk more."), rollout("Hm")]
    plain = actor_of(model=str(first)).score(answers)
    assert all(score.parts.keys() == {"reward_model"} and score.disagreement is None for score in plain)
    for how in ("mean", "min", "mean_minus_std"):
        alone = actor_of(model=str(first), ensemble={"how": how, "std_coef": 3.0}).score(answers)
        assert [score.total for score in alone] == [score.total for score in plain]
    twice = actor_of(model=str(first), ensemble={"models": [str(tmp_path / "copy")], "how": "mean_minus_std"})
    assert [score.total for score in twice.score(answers)] == [score.total for score in plain]
    assert [score.disagreement for score in twice.score(answers)] == [0.0] * 3


def test_members_have_their_own_tokenizer_scale_and_part(tmp_path):
    members = [write_tiny_reward_model(tmp_path / "bytes", seed=3), other_tokenizer(tmp_path / "words", seed=4)]
    for folder, mean in zip(members, (1.0, -2.0), strict=True):
        write_statistics(folder, [mean - 0.5, mean + 0.5])
    answers = [rollout("Rest."), rollout("Walk more.")]
    apart = [[score.total for score in actor_of(model=str(folder)).score(answers)] for folder in members]
    means = [(a + b) / 2 for a, b in zip(*apart, strict=True)]
    stds = [abs(a - b) / 2 for a, b in zip(*apart, strict=True)]
    expected = {
        "mean": means,
        "min": [min(pair) for pair in zip(*apart, strict=True)],
        "mean_minus_std": [mean - 2.5 * std for mean, std in zip(means, stds, strict=True)],
    }
    for how, totals in expected.items():
        ensemble = {"models": [str(members[1])], "how": how, "std_coef": 2.5}
        scores = actor_of(model=str(members[0]), ensemble=ensemble, model_weight=2.0).score(answers)
        assert [score.total for score in scores] == pytest.approx([2.0 * total for total in totals])
        assert [[score.parts[f"reward_model/{k}"] for score in scores] for k in (0, 1)] == apart
        assert [score.disagreement for score in scores] == pytest.approx(stds)
        metrics = score_metrics(scores)
        assert metrics["reward/disagreement"] == pytest.approx(sum(stds) / 2)
        assert metrics["reward/reward_model/1/mean"] == pytest.approx(sum(apart[1]) / 2)


def test_an_answer_that_a_member_cannot_score_has_no_score(tmp_path):
    short = short_judge(tmp_path / "short")
    actor = actor_of(model=str(write_tiny_reward_model(tmp_path / "long")), ensemble={"models": [str(short)]})
    cut, whole = actor.score([rollout("a" * 60), rollout("Rest.")])
    assert (cut.total, cut.disagreement) == (None, None)
    assert cut.parts["reward_model/0"] is not None
    assert cut.parts["reward_model/1"] is None
    assert dict(cut.failures) == {"reward_model": f"length: longer than the positions of {short}"}
    assert whole.total is not None
    metrics = score_metrics([cut, whole])
    assert (metrics["reward/unscored/length"], metrics["reward/disagreement"]) == (1, whole.disagreement)


def test_an_ensemble_of_one_model_or_of_two_scales_is_refused(tmp_path):
    first, second = (write_tiny_reward_model(tmp_path / name, seed=i) for i, name in enumerate(("first", "second")))
    (tmp_path / "link").symlink_to(first)
    for again in (str(first), str(tmp_path / "link"), f"{first}/"):
        with pytest.raises(
            ValueError, match=r"ensemble\.models: got .*first, .*, which is one model, expected each once"
        ):
            actor_of(model=str(first), ensemble={"models": [again]})
    write_statistics(first, [1.0, 3.0])
    ensemble = {"models": [str(second)]}
    with pytest.raises(
        ValueError, match=r"got \S*second without score_statistics\.json, which the others have, expected"
    ):
        actor_of(model=str(first), ensemble=ensemble)
    raw = actor_of(model=str(first), ensemble=ensemble, standardize_model=False).score([rollout("Rest.")])
    assert raw[0].total is not None
    with pytest.raises(
        ValueError, match=r"got reward\.ensemble\.models without reward\.model, expected the first one"
    ):
        actor_of(functions=[{"name": LENGTH}], ensemble=ensemble)
    with pytest.raises(ValueError, match=r"got a part 'reward_model/1', expected another name"):
        actor_of(model=str(first), functions=[{"name": LENGTH, "part": "reward_model/1"}])

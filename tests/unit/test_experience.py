"""Scores and numbers per token -> Experience: everything lands on the token it speaks of."""

from __future__ import annotations

import json

import pytest
import torch

from alignment.experience import kl_per_sequence, make_experience
from alignment.scores import (
    ScoreNormalizer,
    clip_metrics,
    length_penalty,
    normalize_parts,
    refuse_unscorable,
    score_metrics,
    shape_scores,
)
from alignment.types import Prompt, Rollout, Score


def rollout(prompt_ids, response_ids, *, reason="stop"):
    return Rollout(
        prompt=Prompt(id="p", messages=({"role": "user", "content": "q"},), prompt_ids=tuple(prompt_ids)),
        sample_index=0,
        response_ids=tuple(response_ids),
        rollout_logprobs=(-0.5,) * len(response_ids),
        finish_reason=reason,
        response="r",
        weight_version=0,
    )


ROLLOUTS = [rollout([5, 6], [7, 8, 9]), rollout([5, 6, 7, 8], [9])]
OLD = [torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-0.5])]
REF = [torch.tensor([-1.5, -2.0, -2.0]), torch.tensor([-1.0])]
VALUES = [torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4])]


def make(scores=(2.0, 1.0), **settings):
    defaults = {"kl_coef": 0.1, "whiten_advantages": False}
    return make_experience(ROLLOUTS, list(scores), OLD, REF, VALUES, **{**defaults, **settings})


def test_every_number_stands_at_its_token():
    experience, _ = make()
    assert experience.input_ids.tolist() == [[5, 6, 7, 8, 9], [5, 6, 7, 8, 9]]
    assert experience.response_mask.tolist() == [[False, False, True, True, True], [False] * 4 + [True]]
    torch.testing.assert_close(experience.old_logprobs[0], torch.tensor([0, 0, -1.0, -2.0, -3.0]))
    torch.testing.assert_close(experience.old_values[1], torch.tensor([0, 0, 0, 0, 0.4]))
    # -0.1 * (old - ref) per token; the score on the last one.
    torch.testing.assert_close(experience.rewards[0], torch.tensor([0, 0, -0.05, 0.0, 0.1 + 2.0]))
    torch.testing.assert_close(experience.rewards[1], torch.tensor([0, 0, 0, 0, -0.05 + 1.0]))


def test_returns_and_advantages_are_generalised_advantage_estimates():
    experience, _ = make(gamma=1.0, gae_lambda=1.0)
    futures = torch.tensor([2.05, 2.1, 2.1])
    torch.testing.assert_close(experience.returns[0, 2:], futures)
    torch.testing.assert_close(experience.advantages[0, 2:], futures - VALUES[0])


def test_whitening_is_over_the_whole_batch_and_leaves_returns_alone():
    plain, _ = make()
    white, _ = make(whiten_advantages=True)
    mask = white.response_mask
    assert float(white.advantages[mask].mean()) == pytest.approx(0, abs=1e-6)
    assert float(white.advantages[mask].var(unbiased=False)) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(white.returns, plain.returns)


def test_metrics():
    _, metrics = make()
    assert metrics["kl/per_sequence"] == pytest.approx(((0.5 + 0 - 1) + 0.5) / 2)
    assert metrics["rollout/logprob_gap"] == pytest.approx((0.5 + 1.5 + 2.5 + 0) / 4)
    # Log-ratios -0.5, -1.5, -2.5 and 0: ratios 0.60653, 0.22313, 0.08208 and 1; their squares add up to 1.42440.
    assert metrics["rollout/ratio_mean"] == pytest.approx(1.91174582 / 4)
    assert metrics["rollout/effective_sample_size"] == pytest.approx(1.91174582**2 / (4 * 1.42440446))
    assert metrics["rollout/tokens_count"] == 4


def test_a_batch_without_a_score_has_no_kl_to_steer_by():
    """A KL of 0 would be made up, and would lower the weight of the penalty."""
    _, metrics = make(scores=(None, None))
    assert metrics["reward/unscorable_count"] == 2
    assert not [name for name in metrics if name.startswith(("kl/", "critic/", "ppo/", "reward/shaped"))]


def test_kl_per_sequence_ignores_excluded_rows_and_garbage():
    logprobs = torch.tensor([[1.0, 2.0], [5.0, float("nan")]])
    mask = torch.tensor([[True, True], [False, False]])
    assert kl_per_sequence(logprobs, torch.zeros(2, 2), mask) == 3.0


@pytest.mark.parametrize("wrong", [[1.0], [1.0, 2.0, 3.0]])
def test_a_reward_list_of_the_wrong_length_is_refused(wrong):
    with pytest.raises(ValueError, match=rf"got {len(wrong)}, expected 2"):
        make(scores=wrong)


def test_numbers_of_the_wrong_length_are_refused():
    with pytest.raises(ValueError, match="got 2, expected 3"):
        make_experience(ROLLOUTS, [1.0, 1.0], [OLD[0][:2], OLD[1]], REF, VALUES, kl_coef=0.1)


def test_batches_of_rows_are_cut_to_their_longest():
    experience, _ = make()
    assert experience.rows(torch.tensor([1, 0])).input_ids.shape == (2, 5)
    short, _ = make_experience(
        [rollout([5], [6]), ROLLOUTS[0]],
        [1.0, 1.0],
        [OLD[1], OLD[0]],
        [REF[1], REF[0]],
        [VALUES[1], VALUES[0]],
        kl_coef=0.0,
    )
    assert short.rows(torch.tensor([0])).input_ids.tolist() == [[5, 6]]


def test_overlong_penalty_golden():
    """DAPO, arXiv 2503.14476, with L_max 20480 and a buffer of 4096."""
    got = [
        length_penalty(n, max_new_tokens=20480, buffer=4096, penalty=1.0) for n in (16384, 16385, 18432, 20480, 20481)
    ]
    assert got == pytest.approx([0, -0.00024414, -0.5, -1, -1], abs=1e-8)


def test_missing_eos_is_told_by_the_finish_reason_alone():
    eos_in_prompt = rollout([2, 2], [7, 8], reason="length")
    custom_stop = rollout([5], [7, 99], reason="stop")
    shaped = shape_scores(
        [eos_in_prompt, custom_stop], [Score(total=1.0), Score(total=1.0)], max_new_tokens=8, missing_eos_penalty=0.7
    )
    assert shaped == pytest.approx([0.3, 1.0])


def test_clip_comes_before_penalties_and_none_stays_none():
    rows = [rollout([5], [7], reason="length"), rollout([5], [7])]
    shaped = shape_scores(
        rows, [Score(total=9.0), Score(total=None)], max_new_tokens=8, clip=2.0, missing_eos_penalty=0.5
    )
    assert shaped == [1.5, None]


def test_running_normaliser_equals_the_statistics_of_all_scores_and_survives_saving():
    generator = torch.Generator().manual_seed(0)
    scores = (torch.randn(50, generator=generator) * 3 + 1).tolist()
    first, second = ScoreNormalizer(), ScoreNormalizer()
    first.update(scores[:20])
    second.load_state_dict(first.state_dict())
    second.update(scores[20:])
    everything = torch.tensor(scores, dtype=torch.float64)
    assert second.mean == pytest.approx(float(everything.mean()))
    assert second.std == pytest.approx(float(everything.std(unbiased=False)))
    assert second(4.0) == pytest.approx((4 - float(everything.mean())) / float(everything.std(unbiased=False)))
    constant = ScoreNormalizer()
    constant.update([3.0, 3.0])
    assert constant(3.0) == 0.0


PARTS = [
    Score(total=3.0, parts={"a": 1.0, "b": 2.0}),
    Score(total=None, parts={"a": None, "b": 4.0}, failures={"a": "timeout: no answer within 2 s"}),
    Score(total=9.0, parts={"a": 3.0, "b": 6.0}),
]


def test_a_normalised_part_is_scaled_by_what_was_seen_so_far():
    normalizer = ScoreNormalizer()
    weights = {"a": 1.0, "b": 0.5}
    first = normalize_parts(PARTS, {"b": normalizer}, weights)
    spread = (8 / 3) ** 0.5  # of 2, 4 and 6: an answer without a total has a part b
    assert [score.total for score in first] == pytest.approx([1 - 1 / spread, None, 3 + 1 / spread])
    assert [score.parts for score in first] == [score.parts for score in PARTS]
    again = normalize_parts(PARTS[:1], {"b": normalizer}, weights, clips={"b": (-0.5, 0.5)})
    assert normalizer.count == 4
    assert [score.total for score in again] == [pytest.approx(1 - 0.25)]
    resumed = ScoreNormalizer()
    resumed.load_state_dict(json.loads(json.dumps(normalizer.state_dict())))
    ours, theirs = (normalize_parts(PARTS, {"b": one}, weights) for one in (normalizer, resumed))
    assert ours == theirs  # to the last bit
    shut = normalize_parts(PARTS, {"b": ScoreNormalizer()}, weights, gates={"a"})
    assert shut[0].total == pytest.approx(1 - 1 / spread)


def test_every_part_and_every_failure_is_counted():
    assert score_metrics(PARTS) == {
        "reward/mean": 6.0,
        "reward/a/mean": 2.0,
        "reward/a/std": 1.0,
        "reward/a/unscored_count": 1.0,
        "reward/b/mean": 4.0,
        "reward/b/std": pytest.approx((8 / 3) ** 0.5),
        "reward/b/unscored_count": 0.0,
        "reward/unscored/timeout": 1.0,
    }


def test_numbers_beyond_float32_do_not_end_the_run():
    scores = [Score(total=0.5, parts={"gold/a": number}) for number in (1e200, -1e200)]
    metrics = score_metrics(scores)
    assert (metrics["reward/gold/a/mean"], metrics["reward/gold/a/std"]) == (0.0, pytest.approx(1e200))


def test_gold_is_ranked_against_the_total_and_its_failures_are_counted_apart():
    totals, golds = [1.0, 2.0, 3.0, None], [0.9, 0.5, None, None]
    failures = [{}, {}, {"gold/g": "error: x"}, {"a": "timeout: y", "gold/g": "error: z"}]
    scores = [
        Score(total=total, parts={"a": total, "gold/g": gold}, failures=failure)
        for total, gold, failure in zip(totals, golds, failures, strict=True)
    ]
    metrics = score_metrics(scores)
    assert metrics["reward/gold/g/mean"] == pytest.approx(0.7)
    assert metrics["reward/gold/g/proxy_spearman"] == -1.0
    assert "reward/a/proxy_spearman" not in metrics
    assert {name: n for name, n in metrics.items() if "unscored/" in name} == {
        "reward/unscored/timeout": 1.0,
        "reward/gold_unscored/error": 2.0,
    }
    assert "reward/gold/g/proxy_spearman" not in score_metrics(scores[:1])
    with pytest.raises(
        RuntimeError, match=r"got 1 of 4 answers without a score \(1 timeout; the first: .*, a: timeout: y\)"
    ):
        refuse_unscorable([ROLLOUTS[0]] * 4, scores, 0.0)


def test_the_share_that_a_clip_cuts_is_that_of_the_numbers_it_was_given():
    normalizer = ScoreNormalizer()
    normalizer.update([4.0, 8.0])  # mean 6, deviation 2: the parts b are -2, -1 and 0
    limits = {"a": (1.0, 2.5), "b": (-1.0, 1.0)}
    off = {"normalizer": None, "normalizers": {}}
    assert clip_metrics(PARTS, clip=None, clips={}, **off) == {}
    assert clip_metrics(PARTS, clip=3.0, clips=limits, normalizer=None, normalizers={"b": normalizer}) == {
        "reward/clipped_share": 1 / 2,  # of 3 and 9; a number on the limit is not cut
        "reward/a/clipped_share": 1 / 2,  # of 1 and 3
        "reward/b/clipped_share": 1 / 3,
    }
    assert clip_metrics(PARTS, clip=1.2, clips={}, normalizer=normalizer, normalizers={}) == {
        "reward/clipped_share": 1.0  # -1.5 and 1.5
    }
    assert clip_metrics(PARTS[1:2], clip=1.0, clips={}, **off) == {}


def test_more_unscored_answers_than_the_budget_stop_the_run_and_name_the_first():
    rows = [ROLLOUTS[0]] * 3
    refuse_unscorable(rows, PARTS, 1 / 3)
    with pytest.raises(
        RuntimeError,
        match=r"got 1 of 3 answers without a score \(1 timeout; the first: prompt p, sample 0, a: timeout: no answer "
        r"within 2 s\), expected at most 33%; mend the reward, or raise reward\.max_unscorable",
    ):
        refuse_unscorable(rows, PARTS, 0.33)

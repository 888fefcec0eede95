"""Sampler and trainer that disagree: what is measured, what the weights are, and what they make of the gradient."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from toy import ANSWERS, LENGTH, NUM_PROMPTS, NUM_STATES, VOCAB, TabularPolicy, replace, rollout_of, token_logps

from actors.policy import correction_settings
from alignment.config import CorrectionConfig, RolloutConfig
from alignment.engines.torch import TorchEngine
from alignment.experience import make_experience
from alignment.learners.ppo import PolicyLearner
from alignment.losses import ppo_policy_loss
from alignment.packing import MicroBatchLimit
from alignment.rollout_correction import GAP, correction_weights, mismatch_metrics, require_match

GARBAGE = [torch.nan, torch.inf, -torch.inf, 1e10]
KINDS = ("token_tis", "sequence_tis", "icepop")
MEASURED = ("rollout/logprob_gap", "rollout/logprob_gap_max", "rollout/ratio_mean", "rollout/effective_sample_size")


def pair(ratios):
    """Trainer's and sampler's log-probabilities (1, T) of tokens with these ratios, and the mask."""
    sampled = torch.full((1, len(ratios)), 0.1).log()
    return sampled + torch.tensor([ratios]).log(), sampled, torch.ones(1, len(ratios), dtype=torch.bool)


def random_batch(seed=0, rows=6, length=7):
    generator = torch.Generator().manual_seed(seed)
    sampled = -3 * torch.rand(rows, length, generator=generator)
    old = sampled + 0.8 * torch.randn(rows, length, generator=generator)
    mask = torch.rand(rows, length, generator=generator) < 0.7
    mask[2] = False
    return old, sampled, mask


def test_measured_by_hand():
    """Ratios 1/2, 1, 2, 4: gaps of 1, 0, 1 and 2 times log 2; sum 7.5, sum of squares 21.25."""
    got = mismatch_metrics(*pair([0.5, 1.0, 2.0, 4.0]))
    log2 = math.log(2)
    assert tuple(got) == MEASURED
    assert list(got.values()) == pytest.approx([log2, 2 * log2, 1.875, 7.5**2 / (4 * 21.25)], rel=1e-6)


def test_one_heavy_token_leaves_one_effective_sample():
    got = mismatch_metrics(*pair([1e6] + [1e-3] * 99))
    assert got["rollout/effective_sample_size"] == pytest.approx(1 / 100, rel=1e-3)


@pytest.mark.parametrize("shift", [0.0, 0.1, -0.3, 3.0, 7.7])
def test_equal_ratios_are_worth_every_token(shift):
    """Squared means and means of squares round differently; the share never leaves (0, 1]."""
    _, sampled, mask = random_batch(rows=40, length=50)
    got = mismatch_metrics(torch.where(mask, sampled * 0 + shift, 0.0), sampled * 0, mask)
    assert got["rollout/ratio_mean"] == pytest.approx(math.exp(shift), rel=1e-5)
    assert 1 - 1e-5 < got["rollout/effective_sample_size"] <= 1


def test_agreement_is_exact():
    _, sampled, mask = random_batch()
    assert list(mismatch_metrics(sampled, sampled.clone(), mask).values()) == [0.0, 0.0, 1.0, 1.0]


def test_nothing_is_measured_where_nothing_counts():
    old, sampled, mask = random_batch()
    assert mismatch_metrics(old, sampled, torch.zeros_like(mask)) == {}


def test_half_precision_is_compared_in_float32():
    """-10 - 2^-6 is a float16; its difference to -10 is not lost to a bfloat16 subtraction or exponent."""
    old, sampled = torch.tensor([[-10.015625]]).half(), torch.tensor([[-10.0]]).bfloat16()
    got = mismatch_metrics(old, sampled, torch.ones(1, 1, dtype=torch.bool))
    assert got[GAP] == 0.015625
    assert got["rollout/ratio_mean"] == pytest.approx(math.exp(-0.015625), rel=1e-6)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_padding_does_not_show(garbage):
    old, sampled, mask = random_batch()
    dirty = [torch.where(mask, x, garbage) for x in (old, sampled)]
    assert mismatch_metrics(old, sampled, mask) == mismatch_metrics(*dirty, mask)
    for kind in KINDS:
        clean_weights, clean = correction_weights(old, sampled, mask, kind=kind)
        weights, metrics = correction_weights(*dirty, mask, kind=kind)
        assert torch.equal(weights, clean_weights)
        assert weights[~mask].eq(0).all()
        assert metrics == clean


@pytest.mark.parametrize(
    ("settings", "weights", "changed"),
    [
        ({"kind": "token_tis", "cap": 2.0}, [0.5, 1.0, 1.5, 2.0], 0.25),
        ({"kind": "token_tis", "cap": math.inf}, [0.5, 1.0, 1.5, 4.0], 0.0),
        ({"kind": "sequence_tis", "cap": 2.0}, [2.0] * 4, 1.0),  # the product is 3
        ({"kind": "sequence_tis", "cap": 10.0}, [3.0] * 4, 0.0),
        ({"kind": "icepop", "low": 0.6, "high": 3.0}, [0.0, 1.0, 1.5, 0.0], 0.5),
        ({"kind": "icepop", "low": 0.4, "high": 3.0}, [0.5, 1.0, 1.5, 0.0], 0.25),
    ],
)
def test_weights_by_hand(settings, weights, changed):
    got, metrics = correction_weights(*pair([0.5, 1.0, 1.5, 4.0]), **settings)
    assert got[0].tolist() == pytest.approx(weights, rel=1e-5)
    name = "correction_masked_fraction" if settings["kind"] == "icepop" else "correction_truncated_fraction"
    assert {key: value.item() for key, value in metrics.items()} == pytest.approx(
        {"correction_weight_mean": sum(weights) / 4, name: changed}, rel=1e-5
    )


def test_the_product_is_over_the_response_alone():
    """Two rows of ratios 2 and 3, 5 and 7; the last token is padding."""
    old, sampled, mask = (x.repeat(2, 1) for x in pair([1.0, 1.0, 1.0]))
    old = sampled + torch.tensor([[2.0, 3.0, 11.0], [5.0, 7.0, 11.0]]).log()
    mask[:, 2] = False
    weights, _ = correction_weights(old, sampled, mask, kind="sequence_tis", cap=math.inf)
    torch.testing.assert_close(weights, torch.tensor([[6.0, 6.0, 0.0], [35.0, 35.0, 0.0]]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [[3, 3], [1] * 6, [2, 4]])
def test_weights_do_not_depend_on_the_micro_batches(kind, sizes):
    old, sampled, mask = random_batch()
    whole, expected = correction_weights(old, sampled, mask, kind=kind)
    parts, total = [], dict.fromkeys(expected, 0.0)
    for rows in torch.arange(6).split(sizes):
        width = max(int(mask[rows].any(0).nonzero().max()) + 1 if mask[rows].any() else 1, 1)
        weights, metrics = correction_weights(
            old[rows, :width], sampled[rows, :width], mask[rows, :width], kind=kind, denominator=float(mask.sum())
        )
        parts.append(torch.nn.functional.pad(weights, (0, 7 - width)))
        total = {name: total[name] + float(value) for name, value in metrics.items()}
    torch.testing.assert_close(torch.cat(parts), whole)
    assert total == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_have_no_gradient_and_agreement_leaves_exactly_one(kind):
    _, sampled, mask = random_batch()
    old = sampled.clone().requires_grad_()
    weights, metrics = correction_weights(old, sampled, mask, kind=kind)
    assert not weights.requires_grad
    assert weights[mask].eq(1).all()
    assert sorted(float(value) for value in metrics.values()) == [0.0, 1.0]


def test_huge_ratios_stay_finite_and_what_is_not_a_number_stays_loud():
    old, sampled = torch.tensor([[-500.0, 0.0, -1.0]]), torch.tensor([[0.0, -500.0, -1.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    for kind in KINDS:
        weights, metrics = correction_weights(old, sampled, mask, kind=kind, cap=math.inf, high=math.inf)
        assert weights.isfinite().all()
        assert all(value.isfinite() for value in metrics.values())
    got = mismatch_metrics(old, sampled, mask)
    assert got["rollout/logprob_gap_max"] == 500  # the gap itself is not limited, the ratio is
    assert got["rollout/ratio_mean"] == pytest.approx((math.exp(20) + math.exp(-20) + 1) / 3)
    sampled[0, 2] = torch.nan
    assert all(math.isnan(value) for value in mismatch_metrics(old, sampled, mask).values())
    for kind in KINDS:
        assert correction_weights(old, sampled, mask, kind=kind)[0][0, 2].isnan()


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"kind: got 'tis', expected one of \('token_tis', .*'icepop'\)"):
        correction_weights(*pair([1.0]), kind="tis")


def test_the_alarm():
    require_match({GAP: 0.05}, 0.05, step=3)
    require_match({}, 0.05, step=3)  # no answer of the step has a score: nothing was measured, nothing is learnt
    for gap in (0.0501, math.inf, math.nan):
        with pytest.raises(RuntimeError, match=rf"step 3: got a mean gap of {gap:.3g} .*limit=0\.05") as stopped:
            require_match({GAP: gap}, 0.05, step=3)
        for cause in ("temperature", "template", "stale weights", "dtype", "tokenizer", "wrong adapter"):
            assert cause in str(stopped.value)


def test_the_config_reaches_the_function():
    config = RolloutConfig.model_validate({"correction": {"kind": "icepop", "low": 0.7}}).correction
    weights, _ = correction_weights(*pair([0.6, 0.8, 4.9, 5.1]), **correction_settings(config))
    assert weights[0].tolist() == pytest.approx([0.0, 0.8, 4.9, 0.0])
    assert correction_settings(RolloutConfig().correction) is None
    assert correction_settings(None) is None


@pytest.mark.parametrize("wrong", [{"cap": 0.5}, {"low": 1.1}, {"low": 0}, {"high": 0.9}, {"kind": "tis"}])
def test_bounds_that_would_touch_an_agreeing_token_are_refused(wrong):
    with pytest.raises(ValidationError):
        CorrectionConfig.model_validate(wrong)


def test_the_mean_is_over_all_tokens_whatever_their_weight():
    """Advantages 1 and 3 at ratio 1: -2 unweighted. Without the second token it is -1/2, not -1."""
    zeros, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    advantages = torch.tensor([[1.0, 3.0]])
    losses = [
        ppo_policy_loss(zeros, zeros, advantages, mask, clip_ratio=0.2, weights=weights)
        for weights in (None, torch.ones(1, 2), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 2.0]]))
    ]
    assert [loss.item() for loss, _ in losses] == [-2.0, -2.0, -0.5, -3.25]
    assert all(metrics == losses[0][1] for _, metrics in losses)  # of the ratio to the old policy: not weighted


@pytest.mark.parametrize("garbage", GARBAGE)
def test_weights_multiply_the_clipped_loss_and_get_no_gradient(garbage):
    generator = torch.Generator().manual_seed(1)
    old, _, mask = random_batch()
    advantages, weights = torch.randn(6, 7, generator=generator), torch.rand(6, 7, generator=generator)
    clips = {"clip_ratio": 0.2, "dual_clip": 3.0}

    def gradients(given):
        leaf = (old + 0.3 * torch.randn(6, 7, generator=torch.Generator().manual_seed(2))).requires_grad_()
        loss, _ = ppo_policy_loss(leaf, old, advantages, mask, weights=given, **clips)
        return loss.item(), *torch.autograd.grad(loss, (leaf, *([] if given is None else [given])), allow_unused=True)

    dirty = torch.where(mask, weights, garbage).requires_grad_()
    loss, got, of_the_weights = gradients(dirty)
    _, plain = gradients(None)
    torch.testing.assert_close(got, plain * weights)
    assert plain.ne(0).any()
    assert of_the_weights is None
    assert math.isfinite(loss)
    with pytest.raises(ValueError, match=r"weights.*expected \(6, 7\)"):
        gradients(weights[:, :1])


# The toy: what is expected of the gradient is a sum over every answer, not a mean over samples.


def toy_policies():
    """Trainer, behaviour policy and rewards (prompts, 64). Ratios reach 6 for a token and 24 for an answer."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(NUM_PROMPTS * NUM_STATES, VOCAB, generator=generator) * 0.7
    other = logits + 0.5 * torch.randn(logits.shape, generator=generator)
    reward = torch.randn(NUM_PROMPTS, len(ANSWERS), generator=generator)
    return TabularPolicy(logits), TabularPolicy(other), reward


def expected_gradient(trainer, behaviour, reward, *, length, correction, one_pass=False):
    """The learner's gradient, in expectation over answers of `length` tokens that `behaviour` samples."""
    answers = ANSWERS[:: VOCAB ** (LENGTH - length), :length]
    logps = behaviour.token_logps()[:, :: VOCAB ** (LENGTH - length), :length]
    rollouts = [
        rollout_of(prompt, tuple(ids), tuple(row.tolist()))
        for prompt in range(NUM_PROMPTS)
        for ids, row in zip(answers.tolist(), logps[prompt], strict=True)
    ]
    trainer = TabularPolicy(trainer.table.detach())
    engine = TorchEngine(trainer.named_parameters(), lr=0.1, total_updates=1)
    learner = PolicyLearner(
        trainer,
        engine,
        minibatch_size=len(rollouts),
        micro_batch_limit=MicroBatchLimit(rows=24),
        clip_ratio=0.2,
        correction=correction,
    )
    engine.step = lambda: {"skipped_count": 0.0}
    old = learner.logprobs(rollouts)
    experience, _ = make_experience(
        rollouts,
        reward[:, : len(answers)].flatten().tolist(),
        [torch.tensor(rollout.rollout_logprobs) for rollout in rollouts] if one_pass else old,
        old,
        [torch.zeros(length)] * len(rollouts),
        kl_coef=0.0,
        gae_lambda=1.0,
        whiten_advantages=False,
    )
    probability = logps.sum(-1).exp().flatten().float().unsqueeze(1)
    # A mean over all answers, each counted as often as it is sampled.
    experience = replace(experience, advantages=experience.advantages * probability * len(answers))
    metrics = (learner.update_on_policy if one_pass else learner.update)(experience, step=0)
    return trainer.table.grad.double(), metrics


def surrogate_gradient(trainer, reward, *, length, token_weights):
    """-d/d table of the mean over prompts and tokens of sum over answers of `token_weights` * reward * log p."""
    table = trainer.table.detach().double().requires_grad_()
    logps = token_logps(table)[:, :: VOCAB ** (LENGTH - length), :length]
    rewards = reward.double()[:, : logps.shape[1]].unsqueeze(-1)
    (gradient,) = torch.autograd.grad(-(token_weights * rewards * logps).sum() / (NUM_PROMPTS * length), table)
    return gradient


def probabilities(policy, length):
    """(prompts, answers, length) p of each token."""
    return policy.token_logps()[:, :: VOCAB ** (LENGTH - length), :length].exp()


@pytest.mark.parametrize("one_pass", [False, True])
def test_sequence_tis_under_its_cap_is_the_on_policy_gradient(one_pass):
    trainer, behaviour, reward = toy_policies()
    own, other = probabilities(trainer, LENGTH), probabilities(behaviour, LENGTH)
    on_policy = surrogate_gradient(trainer, reward, length=LENGTH, token_weights=own.prod(-1, keepdim=True))

    # Twice the same: the gradient of the expected reward itself.
    table = trainer.table.detach().double().requires_grad_()
    objective = (token_logps(table).sum(-1).exp() * reward.double()).sum() / (NUM_PROMPTS * LENGTH)
    torch.testing.assert_close(on_policy, -torch.autograd.grad(objective, table)[0], atol=1e-12, rtol=0)

    def gradient(correction):
        return expected_gradient(trainer, behaviour, reward, length=LENGTH, correction=correction, one_pass=one_pass)[
            0
        ]

    largest = float((own / other).prod(-1).max())
    uncorrected = gradient(None)
    corrected = gradient({"kind": "sequence_tis", "cap": 1.01 * largest})
    truncated = gradient({"kind": "sequence_tis", "cap": largest / 2})
    assert (uncorrected - on_policy).abs().max() > 1e-2
    assert (corrected - on_policy).abs().max() < 1e-6
    assert 1e-4 < (truncated - on_policy).abs().max() < (uncorrected - on_policy).abs().max()


@pytest.mark.parametrize("one_pass", [False, True])
def test_token_tis_corrects_each_token_and_not_what_surrounds_it(one_pass):
    """Exact for answers of one token; for longer ones prefixes and continuations remain the sampler's."""
    trainer, behaviour, reward = toy_policies()
    for length, exact in ((1, True), (LENGTH, False)):
        own, other = probabilities(trainer, length), probabilities(behaviour, length)
        on_policy = surrogate_gradient(trainer, reward, length=length, token_weights=own.prod(-1, keepdim=True))
        weights = other.prod(-1, keepdim=True) * own / other
        half_way = surrogate_gradient(trainer, reward, length=length, token_weights=weights)
        settings = {"length": length, "one_pass": one_pass}
        uncorrected, _ = expected_gradient(trainer, behaviour, reward, correction=None, **settings)
        tis = {"kind": "token_tis", "cap": 1.01 * float((own / other).max())}
        corrected, _ = expected_gradient(trainer, behaviour, reward, correction=tis, **settings)
        assert (uncorrected - on_policy).abs().max() > 1e-2
        assert (corrected - half_way).abs().max() < 1e-6
        assert ((corrected - on_policy).abs().max() < 1e-6) == exact


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("length", [1, LENGTH])
def test_icepop_leaves_out_exactly_the_tokens_outside(length, one_pass):
    trainer, behaviour, reward = toy_policies()
    own, other = probabilities(trainer, length), probabilities(behaviour, length)
    ratio, low, high = own / other, 0.8, 1.3
    inside = (ratio >= low) & (ratio <= high)
    assert 0.2 < inside.double().mean() < 0.9
    weights = torch.where(inside, other.prod(-1, keepdim=True) * ratio, 0.0)
    expected = surrogate_gradient(trainer, reward, length=length, token_weights=weights)
    got, metrics = expected_gradient(
        trainer,
        behaviour,
        reward,
        length=length,
        correction={"kind": "icepop", "low": low, "high": high},
        one_pass=one_pass,
    )
    assert (got - expected).abs().max() < 1e-6
    assert metrics["ppo/correction_masked_fraction"] == pytest.approx(1 - float(inside.double().mean()), abs=1e-6)

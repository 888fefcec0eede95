"""The learners on tiny models: answers do not depend on how the batch is cut, and state survives saving."""

from __future__ import annotations

import pytest
import torch
from tiny_learners import critic_learner, gradients, policy_learner, rollouts_of, sampled_at, state

from alignment import adapters, models
from alignment.checkpoint import load_state, save_state
from alignment.engines.torch import TorchEngine
from alignment.experience import make_experience, reward_rows
from alignment.learners.reward_model import RewardModelLearner
from alignment.loops.offline import rows_for_step
from alignment.loops.reward_report import record_report
from alignment.packing import MicroBatchLimit
from alignment.reward_objectives import Objectives
from alignment.schedules import KlAdaptiveRate
from alignment.types import PreferencePair


def experience_for(policy, critic, *, scores=None, count=8):
    rollouts = rollouts_of(count)
    old, values = policy.logprobs(rollouts), critic.values(rollouts)
    shifted = [row - 0.1 for row in old]
    scores = [float(i) - 3 for i in range(count)] if scores is None else scores
    return make_experience(rollouts, scores, old, shifted, values, kl_coef=0.05)


@pytest.mark.parametrize("lora", [False, True])
def test_policy_update_does_not_depend_on_the_micro_batch_size(tiny, lora):
    results = []
    for size in (8, 3, 1):
        learner = policy_learner(tiny / "policy", micro_batch_size=size, lora=lora, entropy_coef=0.01)
        experience, _ = experience_for(learner, critic_learner(tiny / "policy"))
        metrics = learner.update(experience, step=0)
        results.append((metrics, state(learner)))
    for metrics, weights in results[1:]:
        assert metrics == pytest.approx(results[0][0], rel=1e-4, abs=1e-5)
        for name, tensor in weights.items():
            # Adam divides by the gradient's own size: where that is near 0, rounding decides the sign of a whole step.
            torch.testing.assert_close(tensor, results[0][1][name], rtol=1e-3, atol=2e-4)


def test_policy_gradient_is_that_of_the_whole_batch(tiny):
    found = []
    for size in (8, 3, 1):
        learner = policy_learner(tiny / "policy", micro_batch_size=size)
        experience, _ = experience_for(learner, critic_learner(tiny / "policy"))
        found.append(gradients(learner, lambda: learner.update(experience, step=0)))  # noqa: B023
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_critic_gradient_is_that_of_the_whole_batch(tiny):
    found = []
    for size in (8, 3, 1):
        learner = critic_learner(tiny / "policy", micro_batch_size=size)
        experience, _ = experience_for(policy_learner(tiny / "policy"), learner)
        found.append(gradients(learner, lambda: learner.update(experience, step=0)))  # noqa: B023
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_first_minibatch_is_the_identity(tiny):
    learner = policy_learner(tiny / "policy")
    experience, _ = experience_for(learner, critic_learner(tiny / "policy"))
    check = learner.check(experience)
    assert check["ppo/ratio_mean"] == pytest.approx(1, abs=1e-6)
    assert check["ppo/ratio_max"] == pytest.approx(1, abs=1e-5)
    assert check["ppo/approx_kl"] == pytest.approx(0, abs=1e-9)
    assert check["ppo/clip_fraction"] == 0
    before = state(learner)
    learner.check(experience)
    assert all(torch.equal(before[name], tensor) for name, tensor in state(learner).items())


def test_the_check_takes_rows_that_have_something_to_learn(tiny):
    """The first minibatch has no score at all: its ratio would be 0 and fail for no reason."""
    learner = policy_learner(tiny / "policy", minibatch_size=4)
    experience, _ = experience_for(
        learner, critic_learner(tiny / "policy"), scores=[None, None, None, None, 1.0, None, 2.0, 0.5]
    )
    check = learner.check(experience)
    assert check["ppo/ratio_mean"] == pytest.approx(1, abs=1e-6)
    assert check["ppo/ratio_max"] == pytest.approx(1, abs=1e-5)


def test_a_check_of_nothing_says_so(tiny):
    learner = policy_learner(tiny / "policy")
    experience, _ = experience_for(learner, critic_learner(tiny / "policy"), scores=[None] * 8)
    with pytest.raises(RuntimeError, match="got no answer to learn from among 8"):
        learner.check(experience)


def test_the_critic_learns_its_returns(tiny):
    learner = critic_learner(tiny / "policy")
    learner.value_clip = None
    experience, _ = experience_for(policy_learner(tiny / "policy"), learner)
    first = learner.update(experience, step=0)["critic/squared_error"]
    for step in range(1, 30):
        last = learner.update(experience, step=step)["critic/squared_error"]
    assert last < 0.3 * first


def test_an_unscorable_row_changes_nothing_but_the_count(tiny):
    """Row 5 unscored: the same gradient as if it had never been in the batch."""
    scores = [1.0, -1.0, 0.5, 2.0, -0.5, None, 0.0, 1.5]
    learner, critic = policy_learner(tiny / "policy"), critic_learner(tiny / "policy")
    experience, metrics = experience_for(learner, critic, scores=scores)
    assert metrics["reward/unscorable_count"] == 1
    assert not experience.response_mask[5].any()
    assert (experience.advantages[5] == 0).all()
    got = gradients(learner, lambda: learner.update(experience, step=0))

    other = policy_learner(tiny / "policy", minibatch_size=7)
    kept = [r for i, r in enumerate(rollouts_of(8)) if i != 5]
    old, values = other.logprobs(kept), critic.values(kept)
    without, _ = make_experience(
        kept, [s for s in scores if s is not None], old, [row - 0.1 for row in old], values, kl_coef=0.05
    )
    for a, b in zip(got, gradients(other, lambda: other.update(without, step=0)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_batch_without_scores_moves_nothing(tiny):
    learner, critic = policy_learner(tiny / "policy"), critic_learner(tiny / "policy")
    experience, _ = experience_for(learner, critic, scores=[None] * 8)
    before = state(learner), state(critic)
    learner.update(experience, step=0)
    critic.update(experience, step=0)
    for old, new in zip(before, (state(learner), state(critic)), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)


def test_padding_may_hold_anything(tiny):
    learner = policy_learner(tiny / "policy")
    experience, _ = experience_for(learner, critic_learner(tiny / "policy"))
    expected = gradients(learner, lambda: learner.update(experience, step=0))
    dirty = {name: getattr(experience, name).clone() for name in type(experience).__slots__}
    for name in ("old_logprobs", "rollout_logprobs", "ref_logprobs", "rewards", "old_values", "advantages", "returns"):
        dirty[name][~experience.response_mask] = float("nan")
    dirty["input_ids"][~experience.attention_mask] = 10**6
    other = policy_learner(tiny / "policy")
    got = gradients(other, lambda: other.update(type(experience)(**dirty), step=0))
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_a_large_kl_ends_the_update_early(tiny):
    learner = policy_learner(tiny / "policy", minibatch_size=2, ppo_epochs=4, kl_stop=1e-4)
    learner.engine.lr = 0.05
    experience, _ = experience_for(learner, critic_learner(tiny / "policy"))
    assert learner.update(experience, step=0)["ppo/updates_count"] < 16


def test_the_rate_follows_the_kl(tiny):
    rate = KlAdaptiveRate(1e-8, (0.1, 4.0))
    learner = policy_learner(tiny / "policy", minibatch_size=2, adaptive_rate=rate)
    experience, _ = experience_for(learner, critic_learner(tiny / "policy"))
    learner.update(experience, step=0)
    assert learner.engine.rate_factor == pytest.approx(1 / 1.5)
    assert learner.update(experience, step=1)["ppo/lr"] == pytest.approx(1e-3 / 1.5)


@pytest.mark.parametrize(("target_in_kls", "factor"), [(0.4, 1 / 1.5), (1.5, 1.0), (2.5, 1.5)])
def test_the_rate_follows_the_kl_of_the_last_minibatch(tiny, target_in_kls, factor):
    """Two minibatches, the first with a KL of 0: the mean, half the last, would steer otherwise in the first cases."""
    plain = policy_learner(tiny / "policy", minibatch_size=4)
    experience, _ = experience_for(plain, critic_learner(tiny / "policy"))
    last = 2 * plain.update(experience, step=0)["ppo/approx_kl"]
    assert last > 1e-6
    rate = KlAdaptiveRate(target_in_kls * last, (0.1, 4.0))
    learner = policy_learner(tiny / "policy", minibatch_size=4, adaptive_rate=rate)
    learner.update(experience, step=0)
    assert learner.engine.rate_factor == pytest.approx(factor)


def test_one_step_per_batch_has_no_kl_to_follow(tiny):
    learner = policy_learner(tiny / "policy", adaptive_rate=KlAdaptiveRate(0.01, (0.1, 4.0)))
    experience, _ = experience_for(learner, critic_learner(tiny / "policy"))
    learner.update(experience, step=0)
    assert learner.engine.rate_factor == 1


def test_a_non_finite_gradient_skips_the_step_and_is_counted(tiny):
    learner = policy_learner(tiny / "policy")
    before = state(learner)
    learner.engine.backward(sum(p.sum() for p in learner.engine.parameters) * float("inf"))
    assert learner.engine.step()["skipped_count"] == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in state(learner).items())


def test_resumed_learner_continues_bit_for_bit(tiny, tmp_path):
    whole = policy_learner(tiny / "policy", lora=True, minibatch_size=4, ppo_epochs=2)
    critic = critic_learner(tiny / "policy")
    experience, _ = experience_for(whole, critic)
    whole.update(experience, step=0)
    adapters.save_adapter(whole.model.model, tmp_path, base="x")
    save_state(tmp_path / "learner.pt", whole.state_dict())
    resumed = policy_learner(tiny / "policy", lora=True, minibatch_size=4, ppo_epochs=2)
    adapters.load_adapter(resumed.model.model, tmp_path)
    resumed.load_state_dict(load_state(tmp_path / "learner.pt"))
    assert whole.update(experience, step=1) == resumed.update(experience, step=1)
    assert all(torch.equal(a, b) for a, b in zip(state(whole).values(), state(resumed).values(), strict=True))


def pairs_of(count):
    """A preference that can be learnt: the chosen answer ends in token 11, the rejected one in token 12."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for i in range(count):
        prompt = tuple(torch.randint(20, 200, (4,), generator=generator).tolist())
        body = tuple(torch.randint(20, 200, (int(torch.randint(1, 6, (1,), generator=generator)),)).tolist())
        made.append(PreferencePair(id=str(i), prompt_ids=prompt, chosen_ids=(*body, 11), rejected_ids=(*body, 12)))
    return made


def reward_learner(folder, micro_batch_size=4):
    model = models.load_scalar_model(str(folder), head="random", seed=0)
    engine = TorchEngine(model.named_parameters(), lr=3e-3, total_updates=60, max_grad_norm=1e9)
    return RewardModelLearner(
        model,
        engine,
        micro_batch_limit=MicroBatchLimit(rows=micro_batch_size),
        objectives=Objectives(center_coef=0.01),
    )


def test_reward_model_gradient_is_that_of_the_whole_batch(tiny):
    pairs = pairs_of(7)
    found = []
    for size in (7, 3, 1):
        learner = reward_learner(tiny / "policy", size)
        found.append(gradients(learner, lambda: learner.update(pairs, step=0)))  # noqa: B023
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_reward_model_learns_a_preference_and_generalises(tiny):
    pairs = pairs_of(64)
    learner = reward_learner(tiny / "policy")

    def accuracy():
        return record_report(pairs[48:], learner.scores(pairs[48:]))["accuracy"]

    for step in range(40):
        learner.update(rows_for_step(pairs[:48], step, batch_size=8, seed=0), step=step)
    assert accuracy() >= 0.9


def test_pairs_are_dealt_without_gaps_or_repeats():
    pairs = pairs_of(10)
    dealt = [pair.id for step in range(5) for pair in rows_for_step(pairs, step, batch_size=4, seed=0)]
    assert sorted(dealt) == sorted([pair.id for pair in pairs] * 2)
    assert sorted(dealt[:10]) == sorted(pair.id for pair in pairs)


def test_one_pass_updates_are_the_ordinary_ones(tiny):
    """One epoch over one minibatch: `fit` and `update_on_policy` give the gradients of the separate passes."""
    rollouts = rollouts_of(8)
    scores = [1.0, -1.0, 0.5, 2.0, -0.5, None, 0.0, 1.5]
    settings = {"kl_coef": 0.05, "gamma": 1.0, "gae_lambda": 0.9}
    policy, critic = policy_learner(tiny / "policy"), critic_learner(tiny / "policy", micro_batch_size=3)
    old, values = policy.logprobs(rollouts), critic.values(rollouts)
    ref = [row - 0.1 for row in old]
    experience, _ = make_experience(sampled_at(rollouts, old), scores, old, ref, values, **settings)
    expected_policy = gradients(policy, lambda: policy.update(experience, step=0))
    expected_critic = gradients(critic, lambda: critic.update(experience, step=0))

    other, other_critic = policy_learner(tiny / "policy"), critic_learner(tiny / "policy", micro_batch_size=3)
    rewards, learn = reward_rows(rollouts, scores, old, ref, kl_coef=0.05)
    rows = [numbers[where] for numbers, where in zip(rewards, learn, strict=True)]
    fitted = []
    got_critic = gradients(
        other_critic, lambda: fitted.append(other_critic.fit(rollouts, rows, gamma=1.0, gae_lambda=0.9))
    )
    for a, b in zip(values, fitted[0][0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    metrics = {}
    got_policy = gradients(other, lambda: metrics.update(other.update_on_policy(experience, step=0)))
    assert metrics["ppo/ratio_mean"] == pytest.approx(1, abs=1e-6)
    assert metrics["rollout/logprob_gap"] == pytest.approx(0, abs=1e-5)
    for expected, got in ((expected_policy, got_policy), (expected_critic, got_critic)):
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_the_gap_to_the_sampler_is_measured_where_it_counts(tiny):
    """Sampler off by 0.1 everywhere, by 0.5 on row 2, and by 9 on row 5, which is excluded."""
    learner, rollouts = policy_learner(tiny / "policy", micro_batch_size=3), rollouts_of(8)
    shifts = [0.1, 0.1, 0.5, 0.1, 0.1, 9.0, 0.1, 0.1]
    sampled = [row - shift for row, shift in zip(learner.logprobs(rollouts), shifts, strict=True)]
    scores = [None if i == 5 else float(i) for i in range(8)]
    zeros = [torch.zeros_like(row) for row in sampled]
    experience, _ = make_experience(sampled_at(rollouts, sampled), scores, sampled, sampled, zeros, kl_coef=0.0)
    metrics = learner.update_on_policy(experience, step=0)
    counts = torch.tensor([len(row) if i != 5 else 0 for i, row in enumerate(sampled)])
    assert metrics["rollout/logprob_gap"] == pytest.approx(float((counts * torch.tensor(shifts)).sum() / counts.sum()))
    assert metrics["rollout/logprob_gap_max"] == pytest.approx(0.5, rel=1e-4)
    ratios = torch.tensor(shifts).exp()
    assert metrics["rollout/ratio_mean"] == pytest.approx(float((counts * ratios).sum() / counts.sum()), rel=1e-5)
    share = float((counts * ratios).sum() ** 2 / (counts.sum() * (counts * ratios**2).sum()))
    assert metrics["rollout/effective_sample_size"] == pytest.approx(share, rel=1e-5)
    assert not any(name.startswith("ppo/logprob_gap") for name in metrics)

"""Generalised advantage estimation and group baselines against closed forms and hand-computed arrays."""

import itertools

import pytest
import torch

from alignment.advantages import gae, group_advantages
from alignment.kl import shaped_rewards

KINDS = ("grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline")
WITH_BASELINE = ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline")
EIGHT = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0])
ONE_GROUP = torch.zeros(8, dtype=torch.long)


def everything(x: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(x, dtype=torch.bool)


def random_episode(seed: int, length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, length, generator=generator), torch.randn(3, length, generator=generator)


@pytest.mark.parametrize(
    ("gae_lambda", "expected"),
    [
        (1.0, [-1.4511881, -4.4557455, 2.539651, 0.5249, -0.49]),
        (0.7, [-0.6769795, -5.2481667, 2.484608, 0.67043, -0.49]),
        (0.4, [0.5673187, -6.0421244, 2.3431202, 0.81596, -0.49]),
    ],
)
def test_gae_golden_of_a_truncated_episode(gae_lambda, expected):
    """gamma 0.99; the value after the last step is -1."""
    rewards = torch.tensor([[0.0, 0.0, 1.0, 0.0, -0.5]])
    values = torch.tensor([[1.0, 4.0, -3.0, -2.0, -1.0]])
    advantages, returns = gae(
        rewards, values, everything(rewards), gamma=0.99, gae_lambda=gae_lambda, bootstrap_values=torch.tensor([-1.0])
    )
    torch.testing.assert_close(advantages, torch.tensor([expected]), atol=1e-5, rtol=0)
    torch.testing.assert_close(returns, advantages + values)


@pytest.mark.parametrize(
    ("gae_lambda", "expected"),
    [(1.0, [3.0, 2.0, 1.0, 0.0]), (0.7, [2.2899, 1.73, 1.0, 0.0]), (0.4, [1.7256, 1.46, 1.0, 0.0])],
)
def test_gae_golden_of_an_ended_episode_beside_a_truncated_one(gae_lambda, expected):
    """gamma 0.9; the first row ends for good, the second is one step cut off before a state of value -1 (P23)."""
    rewards = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    values = torch.tensor([[-3.0, -2.0, -1.0, 0.0], [5.0, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)
    advantages, _ = gae(
        rewards, values, mask, gamma=0.9, gae_lambda=gae_lambda, bootstrap_values=torch.tensor([0.0, -1.0])
    )
    torch.testing.assert_close(advantages, torch.tensor([expected, [-4.9, 0.0, 0.0, 0.0]]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_gae_identities(seed, gamma):
    """lambda 1: discounted return minus value; lambda 0: the one-step error; no values: the return to go."""
    rewards, values = random_episode(seed)
    mask = everything(rewards)
    to_go = torch.zeros_like(rewards)
    for t in reversed(range(12)):
        to_go[:, t] = rewards[:, t] + (gamma * to_go[:, t + 1] if t < 11 else 0)
    following = torch.cat([values[:, 1:], torch.zeros(3, 1)], dim=1)

    advantages, returns = gae(rewards, values, mask, gamma=gamma, gae_lambda=1.0)
    torch.testing.assert_close(advantages, to_go - values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(returns, to_go, atol=1e-5, rtol=1e-5)
    advantages, _ = gae(rewards, values, mask, gamma=gamma, gae_lambda=0.0)
    torch.testing.assert_close(advantages, rewards + gamma * following - values, atol=1e-5, rtol=1e-5)
    advantages, _ = gae(rewards, torch.zeros_like(values), mask, gamma=gamma, gae_lambda=1.0)
    torch.testing.assert_close(advantages, to_go, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("garbage", [0.0, 100.0, torch.nan, torch.inf, -torch.inf, 1e10])
def test_padding_is_inert_in_gae(garbage):
    """P20, on both sides: prompt slots before, padding after, and a row with nothing at all."""
    rewards, values = random_episode(0, 5)
    expected = gae(rewards, values, everything(rewards), gamma=0.95, gae_lambda=0.9)
    fill = torch.full((3, 3), garbage)
    mask = torch.cat([torch.zeros(3, 3), torch.ones(3, 5), torch.zeros(3, 3)], dim=1).bool()
    wide = [torch.cat([fill, x, -fill], dim=1) for x in (rewards, values)]
    empty = torch.full((1, 11), garbage)
    result = gae(
        torch.cat([wide[0], empty]),
        torch.cat([wide[1], empty]),
        torch.cat([mask, torch.zeros(1, 11, dtype=torch.bool)]),
        gamma=0.95,
        gae_lambda=0.9,
    )
    for got, want in zip(result, expected, strict=True):
        assert torch.equal(got[:3, 3:8], want)
        assert got[:3][~mask].eq(0).all()
        assert got[3].eq(0).all()


@pytest.mark.parametrize("seed", range(20))
def test_masked_tokens_in_the_middle_are_as_if_deleted(seed):
    """P21: the scan over random masks equals the scan over what is left, row by row."""
    rewards, values = random_episode(seed)
    mask = torch.rand(3, 12, generator=torch.Generator().manual_seed(seed)) < 0.5
    dirty = [torch.where(mask, x, torch.nan) for x in (rewards, values)]
    bootstrap = torch.tensor([0.0, 2.0, -1.0])
    result = gae(dirty[0], dirty[1], mask, gamma=0.9, gae_lambda=0.8, bootstrap_values=bootstrap)
    for row in range(3):
        kept_rewards, kept_values = (x[row : row + 1, mask[row]] for x in (rewards, values))
        expected = gae(
            kept_rewards,
            kept_values,
            everything(kept_rewards),
            gamma=0.9,
            gae_lambda=0.8,
            bootstrap_values=bootstrap[row, None],
        )
        for got, want in zip(result, expected, strict=True):
            assert torch.equal(got[row, mask[row]], want[0])


def test_multiplying_by_the_mask_would_flip_the_sign():
    """P21, by hand: V = 1, a tool token, V = 3, reward 0 and 4. Skipping: A_0 = 3 - 1 + 1 = 3."""
    rewards, values = torch.tensor([[0.0, 0.0, 4.0]]), torch.tensor([[1.0, torch.nan, 3.0]])
    advantages, _ = gae(rewards, values, torch.tensor([[True, False, True]]), gamma=1.0, gae_lambda=1.0)
    assert advantages.tolist() == [[3.0, 0.0, 1.0]]
    one_step, _ = gae(rewards, values, torch.tensor([[True, False, True]]), gamma=1.0, gae_lambda=0.0)
    assert one_step.tolist() == [[2.0, 0.0, 1.0]]


@pytest.mark.parametrize("gamma", [1.0, 0.5])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.95])
def test_the_last_response_token_gets_the_score_minus_its_value(gamma, gae_lambda):
    """P22: whatever follows it."""
    mask = torch.tensor([[0, 1, 1, 0, 0]], dtype=torch.bool)
    values = torch.tensor([[8.0, 1.0, 2.5, 100.0, torch.nan]])
    logprobs = torch.tensor([[torch.nan, -1.0, -1.0, 50.0, torch.inf]])
    rewards = shaped_rewards(torch.tensor([7.0]), logprobs, logprobs.clone(), mask, kl_coef=0.3)
    advantages, _ = gae(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda)
    assert advantages[0, 2].item() == 7.0 - 2.5


def test_returns_to_go_do_not_collect_masked_kl():
    """P24: with values 0 and lambda 1 the estimator is a return; tool tokens and padding add no penalty."""
    mask = torch.tensor([[0, 1, 0, 1, 0]], dtype=torch.bool)
    logprobs = torch.tensor([[9.0, -1.0, 9.0, -1.0, 9.0]])
    ref_logprobs = torch.tensor([[0.0, -1.5, 0.0, -1.5, 0.0]])
    rewards = shaped_rewards(torch.tensor([1.0]), logprobs, ref_logprobs, mask, kl_coef=0.1)
    to_go, _ = gae(rewards, torch.zeros(1, 5), mask, gamma=1.0, gae_lambda=1.0)
    torch.testing.assert_close(to_go, torch.tensor([[0.0, 0.9, 0.0, 0.95, 0.0]]))


def test_gae_gives_constants_and_refuses_shapes_that_would_broadcast():
    values = torch.zeros(2, 3, requires_grad=True)
    advantages, returns = gae(torch.ones(2, 3), values, torch.ones(2, 3), gamma=1.0, gae_lambda=1.0)
    assert not advantages.requires_grad
    assert not returns.requires_grad
    with pytest.raises(ValueError, match="expected the same shape"):
        gae(torch.ones(2, 3), torch.ones(2, 1), torch.ones(2, 3), gamma=1.0, gae_lambda=1.0)
    with pytest.raises(ValueError, match=r"bootstrap_values: got shape \(2, 1\), expected \(2,\)"):
        gae(torch.ones(2, 3), values, torch.ones(2, 3), gamma=1.0, gae_lambda=1.0, bootstrap_values=torch.ones(2, 1))


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        ("grpo", 1.2076124, -0.7245674),
        ("dr_grpo", 0.625, -0.375),
        ("rloo", 0.7142857, -0.4285714),
        ("reinforce_pp", 1.2909944, -0.7745966),
        ("reinforce_pp_baseline", 1.2909944, -0.7745966),
    ],
)
def test_group_golden(kind, right, wrong):
    advantages = group_advantages(EIGHT, ONE_GROUP, kind=kind)
    torch.testing.assert_close(advantages, torch.where(EIGHT == 1, right, wrong), atol=1e-6, rtol=0)
    assert advantages.sum().abs() < 1e-5


def test_grpo_with_the_unbiased_deviation():
    """P25: 0, 0, 1, 1."""
    advantages = group_advantages(torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.zeros(4), kind="grpo")
    torch.testing.assert_close(advantages, torch.tensor([-0.866024, -0.866024, 0.866024, 0.866024]), atol=1e-6, rtol=0)


def test_rloo_is_the_score_minus_the_mean_of_the_others():
    torch.manual_seed(0)
    scores = torch.randn(7, dtype=torch.float64)
    expected = torch.stack([scores[i] - torch.cat([scores[:i], scores[i + 1 :]]).mean() for i in range(7)])
    torch.testing.assert_close(group_advantages(scores, torch.zeros(7), kind="rloo"), expected)


@pytest.mark.parametrize("kind", WITH_BASELINE)
def test_groups_of_different_sizes_with_a_constant_one(kind):
    """P25: groups of 4, 3 and 4; [5, 5, 5] gets exactly 0 and the others do not see it."""
    scores = torch.tensor([1.0, 0.0, 0.0, 1.0, 5.0, 5.0, 5.0, 2.0, 2.0, 0.5, 9.0])
    ids = torch.tensor([3] * 4 + [0] * 3 + [8] * 4)
    advantages = group_advantages(scores, ids, kind=kind)
    assert advantages[4:7].tolist() == [0.0, 0.0, 0.0]
    assert advantages[:4].abs().min() > 0
    if kind != "reinforce_pp_baseline":
        torch.testing.assert_close(advantages[:4], group_advantages(scores[:4], ids[:4], kind=kind))
        torch.testing.assert_close(advantages[7:], group_advantages(scores[7:], ids[7:], kind=kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_order_is_kept_whatever_the_order(kind, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(11, generator=generator, dtype=torch.float64)
    ids = torch.tensor([7] * 4 + [1] * 3 + [4] * 4)
    order = torch.randperm(11, generator=generator)
    expected = group_advantages(scores, ids, kind=kind)[order]
    torch.testing.assert_close(group_advantages(scores[order], ids[order], kind=kind), expected)
    names = [f"prompt-{i}" for i in ids[order].tolist()]
    torch.testing.assert_close(group_advantages(scores[order], names, kind=kind), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.1, 0.7, -3.3, 1e-8, 12345.678])
@pytest.mark.parametrize("size", [2, 3, 7, 64])
def test_equal_scores_give_exactly_zero(kind, value, size):
    """P26: the float mean of equal numbers leaves a residue that a small deviation would blow up."""
    scores = torch.full((size,), value)
    assert group_advantages(scores, torch.zeros(size), kind=kind).tolist() == [0.0] * size
    almost = scores * (1 + 1e-7 * torch.arange(size).remainder(2))
    assert group_advantages(almost, torch.zeros(size), kind=kind).tolist() == [0.0] * size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scores", [[1.0, 0.0, 0.0, 0.0], [0.0] + [0.95] * 7, [0.1] * 7 + [0.1001], [1e6, 1e6 + 1]])
def test_a_small_deviation_never_explodes(kind, scores):
    """P26: no advantage exceeds sqrt(n) deviations, or the spread itself where nothing is divided."""
    advantages = group_advantages(torch.tensor(scores), torch.zeros(len(scores)), kind=kind)
    assert advantages.isfinite().all()
    assert advantages.abs().max() <= len(scores) ** 0.5 + 1e-5
    assert advantages.abs().max() > 0


def test_reinforce_pp_whitens_over_the_batch_and_ignores_groups():
    scores = torch.tensor([1.0, 2.0, 4.0, 9.0])
    expected = (scores - 4) / (scores.var(unbiased=False) + 1e-8).sqrt()
    for ids in ([0, 1, 2, 3], [0, 0, 1, 1]):
        torch.testing.assert_close(group_advantages(scores, ids, kind="reinforce_pp"), expected)


def test_reinforce_pp_baseline_subtracts_the_group_and_scales_over_the_batch():
    scores, ids = torch.tensor([1.0, 3.0, 10.0, 16.0]), [0, 0, 1, 1]
    expected = torch.tensor([-1.0, 1.0, -3.0, 3.0]) / 5**0.5
    torch.testing.assert_close(group_advantages(scores, ids, kind="reinforce_pp_baseline"), expected)


@pytest.mark.parametrize("kind", ["rloo", "dr_grpo", "grpo"])
def test_expected_policy_gradient_by_enumeration(kind):
    """Every group of 3 answers of a 3-armed policy: RLOO is unbiased, Dr.GRPO is (G - 1) / G of the true gradient.

    GRPO divides by the deviation of each group, so it points elsewhere.
    """
    torch.manual_seed(0)
    logits = torch.randn(3, dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    (true,) = torch.autograd.grad((logits.softmax(-1) * reward).sum(), logits)
    logprobs = logits.log_softmax(-1)
    surrogate = torch.zeros((), dtype=torch.float64)
    for answers in itertools.product(range(3), repeat=3):
        chosen = torch.tensor(answers)
        advantages = group_advantages(reward[chosen], torch.zeros(3), kind=kind)
        probability = logprobs.detach()[chosen].sum().exp()
        surrogate = surrogate + probability * (advantages * logprobs[chosen]).mean()
    (estimate,) = torch.autograd.grad(surrogate, logits)
    if kind == "grpo":
        assert torch.cosine_similarity(estimate, true, dim=0) < 0.999
    else:
        torch.testing.assert_close(estimate, true * (2 / 3 if kind == "dr_grpo" else 1.0))


@pytest.mark.parametrize("kind", WITH_BASELINE)
def test_a_group_of_one_is_refused(kind):
    with pytest.raises(ValueError, match=r"got 2 groups of one answer, expected at least 2 .* raise num_samples"):
        group_advantages(torch.tensor([1.0, 2.0, 3.0, 4.0]), [0, 0, 1, 2], kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_one_is_refused(kind):
    with pytest.raises(ValueError, match="expected at least 2"):
        group_advantages(torch.tensor([1.0]), [0], kind=kind)


def test_group_refusals():
    with pytest.raises(ValueError, match="kind: got 'ppo', expected one of"):
        group_advantages(EIGHT, ONE_GROUP, kind="ppo")
    with pytest.raises(ValueError, match=r"got shape \(8,\) and 7 ids"):
        group_advantages(EIGHT, ONE_GROUP[1:], kind="grpo")
    with pytest.raises(ValueError, match=r"got shape \(8, 1\)"):
        group_advantages(EIGHT.unsqueeze(1), ONE_GROUP, kind="grpo")
    with pytest.raises(ValueError, match=r"got \[nan\], expected finite"):
        group_advantages(torch.tensor([1.0, torch.nan]), [0, 0], kind="grpo")

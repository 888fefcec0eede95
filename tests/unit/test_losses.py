"""Losses against golden arrays, closed forms, garbage under the mask, and every way to split a batch."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alignment.losses import aggregate, ppo_policy_loss, ppo_value_loss, reward_model_loss

GARBAGE = [torch.nan, torch.inf, -torch.inf, 1e10, -1e10, 1e4]
MODES = ("token_mean", "sequence_mean", "sequence_sum")


def per_token_policy_loss(ratios: list[float], advantages: list[float], **clip: Any) -> list[float]:
    """The loss of each token alone, then of all together, from ratios to an old policy of probability 1/2."""
    old = torch.full((1, len(ratios)), 0.5).log()
    new, weight = old + torch.tensor([ratios]).log(), torch.tensor([advantages])
    masks = [*torch.eye(len(ratios), dtype=torch.bool).unsqueeze(1), torch.ones(1, len(ratios), dtype=torch.bool)]
    return [ppo_policy_loss(new, old, weight, mask, **clip)[0].item() for mask in masks]


@pytest.mark.parametrize(("sign", "expected"), [(1.0, -0.1711778), (-1.0, 0.1933333)])
def test_policy_loss_golden_from_logits(sign, expected):
    logits = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, 0.0], [-1.0, -2.0, -3.0]])
    old_logits = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, 0.0], [-3.0, -2.0, -1.0]])
    actions = torch.tensor([[0], [1], [2]])
    new, old = (x.log_softmax(-1).gather(1, actions).T for x in (logits, old_logits))
    advantages = sign * torch.tensor([[0.3, 0.2, 0.1]])
    loss, _ = ppo_policy_loss(new, old, advantages, torch.ones(1, 3, dtype=torch.bool), clip_ratio=0.2)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_policy_loss_golden_per_token():
    losses = per_token_policy_loss([0.5, 1.0, 1.5], [1.0, -1.0, 2.0], clip_ratio=0.2)
    assert losses == pytest.approx([-0.5, 1.0, -2.4, -0.6333333], abs=1e-6)


def test_policy_loss_golden_with_dual_clip():
    losses = per_token_policy_loss([0.5, 1.0, 10.0], [1.0, -1.0, -4.0], clip_ratio=0.2, dual_clip=3.0)
    assert losses == pytest.approx([-0.5, 1.0, 12.0, 4.1666667], abs=1e-5)


def test_policy_loss_with_two_clips():
    """A gain counts up to 1 + 0.28, a loss is felt down to 1 - 0.2; the far sides are not clipped."""
    losses = per_token_policy_loss(
        [1.5, 1.25, 0.5, 0.5, 1.5], [1.0, 1.0, -1.0, 1.0, -1.0], clip_ratio=0.2, clip_ratio_high=0.28
    )
    assert losses[:-1] == pytest.approx([-1.28, -1.25, 0.8, -0.5, 1.5], abs=1e-6)


def test_policy_metrics_by_hand():
    ratio = torch.tensor([[0.5, 1.0, 1.5, 1.5]])
    old = torch.zeros(1, 4)
    mask = torch.ones(1, 4, dtype=torch.bool)
    _, metrics = ppo_policy_loss(ratio.log(), old, torch.tensor([[1.0, 1.0, 1.0, -1.0]]), mask, clip_ratio=0.2)
    assert metrics["clip_fraction"].item() == 0.25
    assert metrics["ratio_mean"].item() == pytest.approx(1.125)
    assert metrics["ratio_max"].item() == pytest.approx(1.5)
    assert metrics["approx_kl"].item() == pytest.approx((ratio - 1 - ratio.log()).mean().item(), abs=1e-6)


def test_the_largest_ratio_is_that_of_a_valid_token():
    """Padding has ratio 1, which must not hide that every valid ratio is below it."""
    mask = torch.tensor([[False, True, True]])
    logprobs = torch.tensor([[3.0, 0.5, 0.25]]).log()
    _, metrics = ppo_policy_loss(logprobs, torch.zeros(1, 3), torch.ones(1, 3), mask, clip_ratio=0.2)
    assert metrics["ratio_max"].item() == pytest.approx(0.5)
    assert metrics["ratio_mean"].item() == pytest.approx(0.375)


def random_policy_batch(seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    mask = torch.rand(8, 6) < 0.6
    mask[:, 0] = False
    mask[2] = False
    old = -torch.rand(8, 6) * 3
    return {
        "logprobs": old + 0.5 * torch.randn(8, 6),
        "old_logprobs": old,
        "advantages": torch.randn(8, 6),
        "response_mask": mask,
    }


def test_first_minibatch_identity():
    """Before any update: ratio 1, KL 0, nothing clipped, the loss is minus the mean advantage - all exact."""
    batch = random_policy_batch()
    batch["logprobs"] = batch["old_logprobs"].clone()
    loss, metrics = ppo_policy_loss(**batch, clip_ratio=0.2, dual_clip=3.0)
    assert {name: value.item() for name, value in metrics.items()} == {
        "clip_fraction": 0.0,
        "approx_kl": 0.0,
        "ratio_mean": 1.0,
        "ratio_max": 1.0,
    }
    assert loss.item() == pytest.approx(-batch["advantages"][batch["response_mask"]].mean().item(), abs=1e-6)


def test_gradient_at_the_old_policy_is_the_policy_gradient():
    batch = random_policy_batch()
    mask = batch["response_mask"]
    logprobs = batch["old_logprobs"].clone().requires_grad_()
    ppo_policy_loss(**{**batch, "logprobs": logprobs}, clip_ratio=0.2)[0].backward()
    expected = torch.where(mask, -batch["advantages"] / mask.sum(), 0.0)
    torch.testing.assert_close(logprobs.grad, expected)


def test_only_tokens_inside_the_clip_have_a_gradient():
    ratio = torch.tensor([[0.5, 0.9, 1.1, 1.5, 0.5, 0.9, 1.1, 1.5, 10.0]])
    advantages = torch.tensor([[1.0] * 4 + [-1.0] * 5])
    logprobs = ratio.log().requires_grad_()
    mask = torch.ones_like(ratio, dtype=torch.bool)
    loss, _ = ppo_policy_loss(logprobs, torch.zeros_like(ratio), advantages, mask, clip_ratio=0.2, dual_clip=3.0)
    loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.ne(0).tolist() == [[True, True, True, False, False, True, True, True, False]]


def test_a_huge_log_ratio_stays_finite():
    logprobs = torch.tensor([[0.0, -500.0]], requires_grad=True)
    old = torch.tensor([[-500.0, 0.0]])
    loss, metrics = ppo_policy_loss(
        logprobs, old, -torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), clip_ratio=0.2
    )
    loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()
    assert all(value.isfinite() for value in metrics.values())


def test_policy_loss_gradient_is_right():
    batch = {name: x if x.dtype == torch.bool else x.double() for name, x in random_policy_batch(4).items()}
    logprobs = batch.pop("logprobs").requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: ppo_policy_loss(x, **batch, clip_ratio=0.2, clip_ratio_high=0.3, dual_clip=3.0)[0], logprobs
    )


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("denominator", [None, 40.0])
def test_masked_garbage_is_inert_in_the_policy_loss(garbage, denominator):
    """P18: loss, gradients and metrics are bitwise those of clean padding, one tensor at a time and all at once."""
    clean = random_policy_batch()
    mask = clean["response_mask"]
    names = ("logprobs", "old_logprobs", "advantages")
    results: list[list[Tensor]] = []
    for dirty in ((), *((name,) for name in names), names):
        batch = {**clean, **{name: torch.where(mask, clean[name], garbage) for name in dirty}}
        leaf = batch.pop("logprobs").clone().requires_grad_()
        loss, metrics = ppo_policy_loss(leaf, **batch, clip_ratio=0.2, dual_clip=3.0, denominator=denominator)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaf), *metrics.values()])
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], result, strict=True))
    assert results[0][1][~mask].eq(0).all()


def test_value_loss_golden():
    values, old = torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[0.0, 0.0, 0.5]])
    returns = torch.ones(1, 3)
    masks = [*torch.eye(3, dtype=torch.bool).unsqueeze(1), torch.ones(1, 3, dtype=torch.bool)]
    clipped = [ppo_value_loss(values, old, returns, mask, value_clip=0.2)[0].item() for mask in masks]
    assert clipped == pytest.approx([0.5, 0.32, 0.5, 0.44], abs=1e-6)
    plain = [ppo_value_loss(values, old, returns, mask, value_clip=None)[0].item() for mask in masks]
    assert plain == pytest.approx([0.5, 0.0, 0.5, 1 / 3], abs=1e-6)
    _, metrics = ppo_value_loss(values, old, returns, masks[-1], value_clip=0.2)
    assert metrics["clip_fraction"].item() == pytest.approx(1 / 3)
    assert metrics["squared_error"].item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_masked_garbage_is_inert_in_the_value_loss(garbage):
    torch.manual_seed(0)
    mask = torch.rand(4, 6) < 0.5
    tensors = [torch.randn(4, 6) for _ in range(3)]
    results = []
    for fill in (0.0, garbage):
        values, old, returns = (torch.where(mask, x, fill) for x in tensors)
        values.requires_grad_()
        loss, metrics = ppo_value_loss(values, old, returns, mask, value_clip=0.2)
        results.append([loss.detach(), *torch.autograd.grad(loss, values), *metrics.values()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_value_loss_refuses_shapes_that_would_broadcast():
    """P33: (B,) against (B, 1)."""
    values, mask = torch.zeros(5), torch.ones(5, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"got {'returns': \(5, 1\)}, expected \(5,\)"):
        ppo_value_loss(values, values, torch.zeros(5, 1), mask, value_clip=0.2)
    with pytest.raises(ValueError, match="shapes: got"):
        ppo_policy_loss(torch.zeros(5, 1), values, values, mask, clip_ratio=0.2)


def test_a_step_changes_every_critic_weight_and_lowers_the_error():
    """P33."""
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    states, returns, mask = torch.randn(6, 5, 4), torch.randn(6, 5) + 2, torch.rand(6, 5) < 0.7
    old = critic(states).squeeze(-1).detach()
    before = [p.detach().clone() for p in critic.parameters()]
    losses = []
    for _ in range(2):
        loss, _ = ppo_value_loss(critic(states).squeeze(-1), old, returns, mask, value_clip=0.2)
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, tuple(critic.parameters()))
        with torch.no_grad():
            for p, gradient in zip(critic.parameters(), gradients, strict=True):
                p.sub_(0.01 * gradient)
    assert losses[1] < losses[0]
    assert not any(torch.equal(p, q) for p, q in zip(before, critic.parameters(), strict=True))


def test_aggregate_golden():
    """Two tokens of 1 and eight of 3."""
    per_token = torch.full((2, 8), torch.nan)
    per_token[0, :2], per_token[1] = 1.0, 3.0
    mask = ~per_token.isnan()
    results = {mode: aggregate(per_token, mask, mode=mode).item() for mode in MODES}
    assert results == pytest.approx({"token_mean": 2.6, "sequence_mean": 2.0, "sequence_sum": 13.0})
    # Two micro-batches of one sequence: the global count, never the mean of the means.
    halves = [aggregate(per_token[i, None], mask[i, None], mode="token_mean", denominator=10) for i in range(2)]
    assert torch.stack(halves).sum().item() == pytest.approx(2.6)


def test_aggregate_of_one_number_per_sequence():
    losses, mask = torch.tensor([1.0, 2.0, torch.nan]), torch.tensor([True, True, False])
    assert aggregate(losses, mask, mode="token_mean").item() == 1.5
    with pytest.raises(ValueError, match=r"sequence_mean: got shape \(3,\), expected \(B, T\)"):
        aggregate(losses, mask, mode="sequence_mean")


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_mask_gives_zero_with_a_gradient_of_zero(mode):
    x = torch.full((2, 3), torch.nan, requires_grad=True)
    for denominator in (None, 5.0):
        loss = aggregate(x, torch.zeros(2, 3, dtype=torch.bool), mode=mode, denominator=denominator)
        assert loss.item() == 0.0
        (gradient,) = torch.autograd.grad(loss, x)
        assert gradient.eq(0).all()


@pytest.mark.parametrize("mode", MODES)
def test_filler_rows_are_free(mode):
    """P32: fully masked duplicates change nothing, neither above nor below the line."""
    torch.manual_seed(0)
    per_token, mask = torch.randn(4, 5), torch.rand(4, 5) < 0.7
    mask[:, 0] = True
    padded = torch.cat([per_token, per_token[:2], torch.full((1, 5), torch.inf)])
    wider = torch.cat([mask, torch.zeros(3, 5, dtype=torch.bool)])
    assert torch.equal(aggregate(padded, wider, mode=mode), aggregate(per_token, mask, mode=mode))


def test_filler_rows_are_free_in_the_ppo_losses():
    """P32, for loss and metrics."""
    batch = random_policy_batch()
    filler = {**{name: x[:3] for name, x in batch.items()}, "response_mask": torch.zeros(3, 6, dtype=torch.bool)}
    padded = {name: torch.cat([batch[name], filler[name]]) for name in batch}
    cases: list[tuple[Any, dict[str, float]]] = [
        (ppo_policy_loss, {"clip_ratio": 0.2}),
        (ppo_value_loss, {"value_clip": 0.2}),
    ]
    for loss, arguments in cases:
        plain, plain_metrics = loss(*batch.values(), **arguments)
        filled, filled_metrics = loss(*padded.values(), **arguments)
        torch.testing.assert_close(filled, plain)
        torch.testing.assert_close(filled_metrics, plain_metrics)


def test_aggregate_refusals():
    ones = torch.ones(2, 2)
    with pytest.raises(ValueError, match="mode: got 'mean', expected one of"):
        aggregate(ones, ones, mode="mean")
    with pytest.raises(ValueError, match=r"denominator: got 0\.0, expected the positive count"):
        aggregate(ones, ones, mode="token_mean", denominator=0)
    with pytest.raises(ValueError, match=r"dual_clip: got 1\.0, expected above 1"):
        ppo_policy_loss(ones, ones, ones, ones, clip_ratio=0.2, dual_clip=1.0)


SPLITS = [[8], [4, 4], [2, 2, 2, 2], [1] * 8, [1, 5, 2]]


@pytest.mark.parametrize("kind", ["policy", "value", "reward_model", *MODES])
@pytest.mark.parametrize("sizes", SPLITS)
def test_any_split_into_micro_batches_gives_the_same_gradient_loss_and_metrics(kind, sizes):
    """P29: rows have unequal token counts, one has none; each micro-batch is cut to its own longest row."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    features = torch.randn(8, 6, 3, dtype=torch.float64)
    lengths = torch.tensor([6, 2, 0, 5, 1, 3, 6, 4])
    mask = torch.arange(6) < lengths.unsqueeze(1)
    old, advantages, returns = (torch.randn(8, 6, dtype=torch.float64) for _ in range(3))
    denominators = {"policy": 27.0, "value": 27.0, "reward_model": 8.0, "token_mean": 27.0}

    def loss_of(rows: Tensor, denominator: float | None) -> tuple[Tensor, dict[str, Tensor]]:
        width = 6 if denominator is None else max(int(lengths[rows].max()), 1)
        out, m = model(features[rows, :width]).squeeze(-1), mask[rows, :width]
        if kind == "policy":
            behaviour = old[rows, :width] * 0.3
            return ppo_policy_loss(
                out, behaviour, advantages[rows, :width], m, clip_ratio=0.2, dual_clip=3.0, denominator=denominator
            )
        if kind == "value":
            return ppo_value_loss(
                out, old[rows, :width], returns[rows, :width], m, value_clip=0.2, denominator=denominator
            )
        if kind == "reward_model":
            scores = model(features[rows]).squeeze(-1)
            return reward_model_loss(scores[:, 0], scores[:, 5], center_coef=0.1, denominator=denominator)
        return aggregate(out.tanh(), m, mode=kind, denominator=denominator), {}

    def gradient(loss: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, tuple(model.parameters()))])

    whole, whole_metrics = loss_of(torch.arange(8), None)
    expected = gradient(whole)
    total, summed = torch.zeros((), dtype=torch.float64), torch.zeros_like(expected)
    metrics: dict[str, Tensor] = {}
    for rows in torch.arange(8).split(sizes):
        loss, parts = loss_of(rows, denominators.get(kind, 7.0))
        summed += gradient(loss)
        total += loss.detach()
        for name, value in parts.items():
            before = metrics.get(name, torch.zeros(()))
            metrics[name] = torch.maximum(before, value) if name.endswith("_max") else before + value
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(summed, expected)
    torch.testing.assert_close(total, whole.detach())
    torch.testing.assert_close(metrics, whole_metrics, check_dtype=False, atol=1e-6, rtol=1e-6)


def test_bradley_terry_golden():
    chosen, rejected = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, 3.0])
    single = [reward_model_loss(chosen[i, None], rejected[i, None])[0].item() for i in range(3)]
    assert single == pytest.approx([0.3132617, 0.6931472, 1.3132617], abs=1e-6)
    loss, metrics = reward_model_loss(chosen, rejected)
    assert loss.item() == pytest.approx(0.7732235, abs=1e-6)
    with_margin, _ = reward_model_loss(chosen, rejected, margin=torch.tensor([0.0, 1.0, 0.5]))
    assert with_margin.item() == pytest.approx(1.1093122, abs=1e-6)
    centred, _ = reward_model_loss(chosen, rejected, center_coef=0.01)
    assert centred.item() == pytest.approx(0.8598902, abs=1e-6)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {"accuracy": 1 / 3, "margin": 0.0, "chosen_score": 1.0, "rejected_score": 1.0}
    )


def test_bradley_terry_gradient_is_the_probability_of_being_wrong():
    chosen = torch.tensor([0.3, -2.0], requires_grad=True)
    rejected = torch.tensor([0.1, 4.0], requires_grad=True)
    reward_model_loss(chosen, rejected, margin=torch.tensor([0.0, 0.5]))[0].backward()
    wrong = torch.sigmoid(-(chosen.detach() - rejected.detach() - torch.tensor([0.0, 0.5]))) / 2
    torch.testing.assert_close(chosen.grad, -wrong)
    torch.testing.assert_close(rejected.grad, wrong)


def test_bradley_terry_survives_large_gaps_and_refuses_broadcasting():
    loss, _ = reward_model_loss(torch.tensor([-1e4]), torch.tensor([1e4]))
    assert loss.item() == pytest.approx(2e4)
    with pytest.raises(ValueError, match=r"rejected_scores': \(3, 1\)"):
        reward_model_loss(torch.zeros(3), torch.zeros(3, 1))

"""KL estimators as values and as gradients, the shaped reward, and the adaptive controller."""

import pytest
import torch

from alignment.kl import AdaptiveKLController, kl_estimate, kl_loss, shaped_rewards

ESTIMATORS = ("k1", "k2", "k3")


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("k1", [0.5, 0.0, -0.5, -1.0]),
        ("k2", [0.125, 0.0, 0.125, 0.5]),
        ("k3", [0.1065307, 0.0, 0.1487213, 0.7182818]),
    ],
)
def test_estimators_per_sample(estimator, expected):
    logprobs = torch.tensor([-1.0, -1.0, -1.0, -1.0])
    ref_logprobs = logprobs + torch.tensor([-0.5, 0.0, 0.5, 1.0])
    torch.testing.assert_close(
        kl_estimate(logprobs, ref_logprobs, estimator), torch.tensor(expected), atol=1e-6, rtol=0
    )


def test_k2_and_k3_are_never_negative_and_k3_stays_finite():
    """P15, over log-ratios far outside what float32 can exponentiate."""
    ref_logprobs = torch.linspace(-500, 500, 2001)
    for estimator in ("k2", "k3"):
        estimate = kl_estimate(torch.zeros_like(ref_logprobs), ref_logprobs, estimator)
        assert estimate.isfinite().all()
        assert estimate.min() >= 0


@pytest.mark.parametrize(
    ("shift", "true", "bias", "std"),
    [
        (0.1, 0.005, {"k1": 0.0, "k2": 0.002, "k3": 0.0}, {"k1": 20.0, "k2": 1.418, "k3": 1.417}),
        (1.0, 0.5, {"k1": 0.0, "k2": 0.25, "k3": 0.0}, {"k1": 2.0, "k2": 1.735, "k3": 1.682}),
    ],
)
def test_estimators_on_two_gaussians(shift, true, bias, std):
    """Policy N(0, 1), reference N(shift, 1): bias / true within four standard errors, std / true within 5 %."""
    count = 200_000
    x = torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for estimator in ESTIMATORS:
        relative = kl_estimate(-(x**2) / 2, -((x - shift) ** 2) / 2, estimator) / true
        assert relative.std().item() == pytest.approx(std[estimator], rel=0.05)
        assert relative.mean().item() - 1 == pytest.approx(bias[estimator], abs=4 * std[estimator] / count**0.5)


def two_distributions() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, dtype=torch.float64, requires_grad=True), torch.randn(6, dtype=torch.float64).log_softmax(-1)


def exact_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p.exp() * (p - q)).sum()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_expected_gradient_of_each_estimator_by_enumeration(estimator):
    """E grad k1 = 0; E grad k2 = grad KL(policy || ref); E grad k3 = grad KL(ref || policy)."""
    logits, ref = two_distributions()
    logprobs = logits.log_softmax(-1)
    expectation = (logprobs.detach().exp() * kl_estimate(logprobs, ref, estimator)).sum()
    (gradient,) = torch.autograd.grad(expectation, logits)
    logprobs = logits.log_softmax(-1)
    if estimator == "k1":
        expected = torch.zeros_like(logits)
    else:
        exact = exact_kl(logprobs, ref) if estimator == "k2" else exact_kl(ref, logprobs)
        (expected,) = torch.autograd.grad(exact, logits)
    torch.testing.assert_close(gradient, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_a_step_on_the_kl_loss_lowers_the_exact_kl(estimator):
    """P16, on 4096 sampled tokens."""
    logits, ref = two_distributions()
    samples = torch.multinomial(logits.detach().softmax(-1), 4096, replacement=True).unsqueeze(0)
    before = exact_kl(logits.detach().log_softmax(-1), ref)
    mask = torch.ones_like(samples, dtype=torch.bool)
    loss, metrics = kl_loss(logits.log_softmax(-1)[samples], ref[samples], mask, estimator=estimator)
    assert torch.equal(metrics["kl"], loss.detach())
    (gradient,) = torch.autograd.grad(loss, logits)
    assert exact_kl((logits.detach() - 0.1 * gradient).log_softmax(-1), ref) < before - 0.01


def test_k1_is_refused_as_a_loss():
    ones = torch.ones(1, 2)
    with pytest.raises(ValueError, match="got k1 for a loss, expected k2 or k3"):
        kl_loss(ones, ones, ones, estimator="k1")


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 1e10])
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_masked_garbage_is_inert_in_the_kl_loss(estimator, garbage):
    """P18, with the denominator of a larger batch."""
    torch.manual_seed(1)
    logprobs, ref = -torch.rand(3, 5), -torch.rand(3, 5)
    mask = torch.rand(3, 5) < 0.5
    results = []
    for fill in (0.0, garbage):
        leaf = torch.where(mask, logprobs, fill).requires_grad_()
        loss, metrics = kl_loss(leaf, torch.where(mask, ref, -fill), mask, estimator=estimator, denominator=10)
        results.append((loss.detach(), metrics["kl"], *torch.autograd.grad(loss, leaf)))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


def test_shaped_rewards_golden():
    """Scores 1, 2, 3, coefficient 0.5, per-token log-ratio -0.1 x score."""
    scores = torch.tensor([1.0, 2.0, 3.0])
    logprobs = (-0.1 * scores).unsqueeze(1).expand(3, 3)
    mask = torch.ones(3, 3, dtype=torch.bool)
    rewards = shaped_rewards(scores, logprobs, torch.zeros(3, 3), mask, kl_coef=0.5)
    expected = torch.tensor([[0.05, 0.05, 1.05], [0.1, 0.1, 2.1], [0.15, 0.15, 3.15]])
    torch.testing.assert_close(rewards, expected)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 1e10])
def test_score_lands_on_the_last_true_position_and_padding_is_inert(estimator, garbage):
    mask = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    logprobs = torch.where(mask, -1.0, garbage)
    ref_logprobs = torch.where(mask, -1.5, -garbage)
    scores = torch.tensor([10.0, 20.0, torch.nan, 30.0])
    rewards = shaped_rewards(scores, logprobs, ref_logprobs, mask, kl_coef=0.1, kl_estimator=estimator)
    penalty = -0.1 * {"k1": 0.5, "k2": 0.125, "k3": 0.106531}[estimator]
    expected = torch.where(mask, penalty, 0.0)
    expected[0, 2] += 10
    expected[1, 4] += 20
    expected[3, 4] += 30
    torch.testing.assert_close(rewards, expected, atol=1e-6, rtol=0)


def test_coefficient_zero_never_reads_the_reference():
    """P17: the same as having none."""
    mask = torch.ones(2, 3, dtype=torch.bool)
    rewards = shaped_rewards(
        torch.tensor([1.0, 2.0]), torch.zeros(2, 3), torch.full((2, 3), torch.nan), mask, kl_coef=0.0
    )
    assert rewards.tolist() == [[0.0, 0.0, 1.0], [0.0, 0.0, 2.0]]


def test_rewards_carry_no_gradient():
    logprobs = torch.zeros(1, 2, requires_grad=True)
    rewards = shaped_rewards(torch.ones(1), logprobs, torch.ones(1, 2), torch.ones(1, 2), kl_coef=1.0)
    assert not rewards.requires_grad


@pytest.mark.parametrize(("kl", "expected"), [(6.0, 0.15), (60.0, 0.151536), (0.0, 0.148464), (6.6, 0.150768)])
def test_adaptive_controller_golden(kl, expected):
    """P19, 512 sequences of a horizon of 10 000."""
    controller = AdaptiveKLController(0.15, 6.0, 10_000)
    assert controller.update(kl, 512) == pytest.approx(expected, abs=1e-9)
    assert controller.value == pytest.approx(expected, abs=1e-9)


def test_adaptive_controller_finds_the_coefficient_that_gives_the_target():
    """Closed loop with KL = 1 / coefficient: the fixed point is 1 / target."""
    controller = AdaptiveKLController(1.0, 5.0, 1000)
    for _ in range(400):
        controller.update(1 / controller.value, 100)
    assert controller.value == pytest.approx(0.2, rel=1e-3)


def test_adaptive_controller_resumes():
    controller = AdaptiveKLController(0.15, 6.0, 10_000)
    controller.update(60.0, 512)
    resumed = AdaptiveKLController(0.15, 6.0, 10_000)
    resumed.load_state_dict(controller.state_dict())
    assert resumed.update(3.0, 512) == controller.update(3.0, 512)


def test_refusals():
    ones = torch.ones(2, 3)
    with pytest.raises(ValueError, match="got 'k4', expected k1, k2 or k3"):
        kl_estimate(ones, ones, "k4")
    with pytest.raises(ValueError, match="expected one shape"):
        kl_estimate(ones, ones[:, :1], "k1")
    with pytest.raises(ValueError, match=r"scores: got shape \(2, 1\), expected \(2,\)"):
        shaped_rewards(torch.ones(2, 1), ones, ones, ones, kl_coef=0.1)
    with pytest.raises(ValueError, match=r"kl\.target: got 0"):
        AdaptiveKLController(0.1, 0.0, 100)
    with pytest.raises(ValueError, match="kl: got nan"):
        AdaptiveKLController(0.1, 1.0, 100).update(float("nan"), 1)
    with pytest.raises(ValueError, match=r"got 100 for steps of 500 sequences, expected more than 100 "):
        AdaptiveKLController(0.1, 1.0, 100).update(0.0, 500)

"""Masked statistics against hand-computed arrays, and inertness of what the mask hides."""

import pytest
import torch

from alignment.masked import masked_mean, masked_sum, masked_var, whiten

GARBAGE = [torch.nan, torch.inf, -torch.inf, 1e10, -1e10]
GRID = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])
GRID_WHITENED = torch.tensor(
    [[0.0508068, 0.4381051, 0.8254034], [1.2127017, 1.6, 1.9872983], [2.3745966, 2.7618949, 3.1491932]]
)


def random_case(seed: int, garbage: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    mask = torch.rand(4, 9, generator=generator) < 0.6
    mask[0] = False
    mask[1, :2] = True
    return x, mask, torch.where(mask, x, garbage)


def test_statistics_of_a_hand_computed_array():
    x = torch.tensor([[1.0, 2.0, torch.nan], [6.0, torch.inf, -torch.inf]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert masked_sum(x, mask).item() == 9.0
    assert masked_mean(x, mask).item() == 3.0
    assert masked_mean(x, mask, dim=1).tolist() == [1.5, 6.0]
    assert masked_var(x, mask).item() == pytest.approx((4 + 1 + 9) / 3)


def test_whiten_golden_keeps_the_mean_when_asked():
    everything = torch.ones_like(GRID, dtype=torch.bool)
    torch.testing.assert_close(whiten(GRID, everything, shift_mean=False), GRID_WHITENED, atol=1e-5, rtol=0)
    torch.testing.assert_close(whiten(GRID, everything), GRID_WHITENED - 1.6, atol=1e-5, rtol=0)


def test_whiten_divides_by_the_biased_deviation():
    result = whiten(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, True, True]))
    torch.testing.assert_close(result, torch.tensor([-(1.5**0.5), 0.0, 1.5**0.5]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_whiten_equals_whitening_the_valid_elements_alone(seed):
    x, mask, dirty = random_case(seed, torch.nan)
    valid = x[mask]
    expected = (valid - valid.mean()) / (valid.var(unbiased=False) + 1e-8).sqrt()
    result = whiten(dirty, mask)
    torch.testing.assert_close(result[mask], expected)
    assert result[~mask].eq(0).all()
    assert masked_mean(result, mask).abs() < 1e-12


@pytest.mark.parametrize("num_valid", [0, 1])
def test_whiten_passes_too_few_elements_through(num_valid):
    x = torch.tensor([[7.5, torch.nan], [torch.inf, -3.0]])
    mask = torch.zeros(2, 2, dtype=torch.bool)
    mask[0, 0] = num_valid == 1
    expected = [[7.5 * num_valid, 0.0], [0.0, 0.0]]
    assert whiten(x, mask).tolist() == expected
    assert whiten(x, mask, shift_mean=False).tolist() == expected


@pytest.mark.parametrize("value", [0.1, -1.7, 1234.567])
@pytest.mark.parametrize("count", [2, 7, 1001])
def test_whitening_a_constant_does_not_amplify_rounding(value, count):
    x = torch.full((count,), value)
    assert whiten(x, torch.ones_like(x, dtype=torch.bool)).abs().max() < 1e-5


def test_an_empty_mask_gives_zero_and_a_zero_gradient():
    x = torch.full((2, 3), torch.nan, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    total = masked_sum(x, mask) + masked_mean(x, mask) + masked_var(x, mask) + masked_mean(x, mask, dim=1).sum()
    assert total.item() == 0.0
    total.backward()
    assert x.grad is not None
    assert x.grad.eq(0).all()


@pytest.mark.parametrize("garbage", GARBAGE)
def test_masked_garbage_is_inert(garbage):
    """P18: neither value nor gradient sees a masked slot."""
    clean, mask, dirty = random_case(3, garbage)
    results = []
    for x in (clean.clone(), dirty):
        x.requires_grad_()
        whitened = whiten(x, mask)
        total = (whitened**3).sum() + masked_mean(x, mask) * masked_var(x, mask) + masked_mean(x, mask, dim=1).sum()
        results.append((whitened.detach(), total.detach(), *torch.autograd.grad(total, x)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert results[1][2][~mask].eq(0).all()


def test_gradients_are_right():
    x, mask, _ = random_case(5, 0.0)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda y: whiten(y, mask), x)
    assert torch.autograd.gradcheck(lambda y: masked_var(y, mask), x)


def test_low_precision_is_summed_in_float32():
    x = torch.full((4096,), 0.1, dtype=torch.bfloat16)
    total = masked_sum(x, torch.ones(4096, dtype=torch.bool))
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(4096 * x[0].item(), rel=1e-6)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"got shape \(3, 1\).*expected the same shape"):
        masked_mean(torch.ones(3), torch.ones(3, 1))

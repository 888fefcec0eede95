"""Token log-probabilities: alignment, temperature, cut supports, and the chunked form against the plain one."""

import pytest
import torch
from torch import nn

from alignment.logprobs import entropy_from_logits, selected_logprobs, sequence_logps, token_logprobs


def random_logits(seed: int, shape: tuple[int, ...] = (3, 7, 11)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator) * 3
    return logits, torch.randint(0, shape[-1], shape[:-1], generator=generator)


@pytest.mark.parametrize("position", range(1, 6))
def test_entry_t_speaks_of_token_t(position):
    """P10: only token `position` is made certain, by the logits before it; only entry `position` says so."""
    vocabulary, length = 8, 6
    input_ids = torch.arange(length).unsqueeze(0)
    logits = torch.zeros(1, length, vocabulary)
    logits[0, position - 1, position] = 1e4
    expected = torch.full((1, length), -torch.log(torch.tensor(float(vocabulary))).item())
    expected[0, 0] = 0.0
    expected[0, position] = 0.0
    torch.testing.assert_close(token_logprobs(logits, input_ids), expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_matches_a_loop_over_the_definition(temperature):
    logits, ids = random_logits(0)
    result = token_logprobs(logits, ids, temperature=temperature)
    for b in range(3):
        assert result[b, 0] == 0
        for t in range(1, 7):
            weights = (logits[b, t - 1].double() / temperature).exp()
            assert result[b, t].item() == pytest.approx((weights[ids[b, t]] / weights.sum()).log().item(), abs=1e-5)


def test_temperature_changes_the_logprob_by_the_closed_form():
    """P11: two tokens with logits (l, 0): log p = -log(1 + e^(-l / T))."""
    logits, ids = torch.tensor([[[2.0, 0.0], [0.0, 0.0]]]), torch.tensor([[1, 0]])
    for temperature in (0.5, 1.0, 2.0):
        expected = -torch.log1p(torch.exp(torch.tensor(-2.0 / temperature))).item()
        assert token_logprobs(logits, ids, temperature=temperature)[0, 1].item() == pytest.approx(expected, abs=1e-6)


def test_a_cut_support_shifts_every_logprob_by_log_s():
    """P12: top-2 of (0.6652, 0.2447, 0.0900) leaves S = 0.91, log S = -0.094344 between sampler and trainer."""
    full = torch.tensor([2.0, 1.0, 0.0]).expand(1, 3, 3)
    torch.testing.assert_close(full[0, 0].softmax(-1), torch.tensor([0.6652, 0.2447, 0.0900]), atol=1e-4, rtol=0)
    cut = full.clone()
    cut[..., 2] = -torch.inf
    ids = torch.tensor([[0, 0, 1]])
    gap = token_logprobs(full, ids) - token_logprobs(cut, ids)
    torch.testing.assert_close(gap, torch.tensor([[0.0, -0.094344, -0.094344]]), atol=1e-5, rtol=0)


def test_half_precision_logits_are_normalised_in_float32():
    logits, ids = random_logits(1)
    logits = logits.bfloat16()
    result = token_logprobs(logits, ids)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, token_logprobs(logits.double(), ids).float(), atol=1e-5, rtol=0)


def test_an_id_outside_the_vocabulary_is_nan_there_only_and_without_gradient():
    logits, ids = random_logits(2)
    clean = token_logprobs(logits, ids)
    ids[0, 5], ids[1, 6] = -100, 11
    logits.requires_grad_()
    result = token_logprobs(logits, ids)
    bad = torch.zeros(3, 7, dtype=torch.bool)
    bad[0, 5] = bad[1, 6] = True
    assert result[bad].isnan().all()
    assert torch.equal(result[~bad], clean[~bad])
    sequence_logps(result, ~bad).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 4].eq(0).all()


def test_entropy_closed_forms():
    uniform = entropy_from_logits(torch.full((5,), 3.0))
    certain = entropy_from_logits(torch.tensor([1e4, 0.0, 0.0]))
    assert uniform.item() == pytest.approx(torch.log(torch.tensor(5.0)).item(), abs=1e-6)
    assert certain.item() == pytest.approx(0.0, abs=1e-6)
    p = torch.tensor([0.1, 0.2, 0.7])
    expected = -(p.sqrt() / p.sqrt().sum() * (p.sqrt() / p.sqrt().sum()).log()).sum()
    torch.testing.assert_close(entropy_from_logits(p.log(), temperature=2.0), expected)


def test_entropy_of_a_cut_support_is_that_of_what_is_left_with_a_finite_gradient():
    logits = torch.tensor([0.3, -torch.inf, 1.2], requires_grad=True)
    entropy = entropy_from_logits(logits)
    torch.testing.assert_close(entropy, entropy_from_logits(torch.tensor([0.3, 1.2])))
    entropy.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad[1] == 0


def test_gradients_are_right():
    logits, ids = random_logits(3, (1, 3, 4))
    logits = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, ids, temperature=0.7), logits)
    assert torch.autograd.gradcheck(lambda x: entropy_from_logits(x, temperature=0.7), logits)


def head_and_states(
    num: int = 50, width: int = 6, vocabulary: int = 13
) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Linear(width, vocabulary), torch.randn(num, width), torch.randint(0, vocabulary, (num,))


@pytest.mark.parametrize("chunk_size", [1, 7, 25, 50, 128])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_chunked_form_equals_the_plain_one_in_value_and_gradient(chunk_size, temperature, with_entropy):
    head, hidden, targets = head_and_states()
    results = []
    for chunked in (False, True):
        states = hidden.clone().requires_grad_()
        if chunked:
            picked, entropy = selected_logprobs(
                states, head, targets, temperature=temperature, chunk_size=chunk_size, with_entropy=with_entropy
            )
            assert (entropy is not None) == with_entropy
        else:
            # One more state at the end, so that state t predicts token t + 1.
            logits = torch.cat([head(states), torch.zeros(1, 13)]).unsqueeze(0)
            ids = torch.cat([torch.zeros(1, dtype=torch.long), targets]).unsqueeze(0)
            picked = token_logprobs(logits, ids, temperature=temperature)[0, 1:]
            entropy = entropy_from_logits(head(states), temperature=temperature)
        numbers = (picked, entropy) if with_entropy else (picked,)
        total = picked.sin().sum() + sum((extra**2).sum() for extra in numbers[1:])
        gradients = torch.autograd.grad(total, (states, head.weight, head.bias))
        results.append((*(number.detach() for number in numbers), *gradients))
    for plain, split in zip(*results, strict=True):
        torch.testing.assert_close(split, plain, atol=1e-5, rtol=1e-5)


def test_gradient_of_picked_logprobs_to_finite_differences():
    head, hidden, targets = head_and_states(num=5)
    head.double()
    states = hidden.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: selected_logprobs(x, head, targets, temperature=0.7)[0], states)


def test_an_id_outside_the_vocabulary_is_nan_and_sends_no_gradient():
    head, hidden, targets = head_and_states(num=4)
    states = hidden.requires_grad_()
    targets[2] = 13
    picked, _ = selected_logprobs(states, head, targets)
    assert picked.isnan().tolist() == [False, False, True, False]
    picked.nansum().backward()
    assert states.grad is not None
    assert states.grad.abs().sum(-1).gt(0).tolist() == [True, True, False, True]


def test_a_single_chunk_calls_the_head_once():
    head, hidden, targets = head_and_states()
    calls: list[int] = []

    def counting_head(states: torch.Tensor) -> torch.Tensor:
        calls.append(len(states))
        return head(states)

    picked, _ = selected_logprobs(hidden.requires_grad_(), counting_head, targets, chunk_size=50)
    picked.sum().backward()
    assert calls == [50]


def test_without_gradient_the_numbers_are_bitwise_those_with_it():
    head, hidden, targets = head_and_states()
    with_grad, _ = selected_logprobs(hidden, head, targets, chunk_size=16)
    with torch.no_grad():
        without, entropy = selected_logprobs(hidden, head, targets, chunk_size=16)
    assert with_grad.requires_grad
    assert entropy is None
    assert torch.equal(with_grad.detach(), without)


def test_logits_are_never_kept_for_the_backward_pass_and_come_in_chunks():
    """Nothing saved for backward is as wide as the vocabulary, and each head call sees one chunk."""
    head, hidden, targets = head_and_states()
    hidden.requires_grad_()
    calls: list[int] = []
    saved: list[tuple[int, ...]] = []

    def counting_head(states: torch.Tensor) -> torch.Tensor:
        calls.append(len(states))
        return head(states)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        picked, _ = selected_logprobs(hidden, counting_head, targets, chunk_size=20)
    assert calls == [20, 20, 10]
    assert not [shape for shape in saved if shape and shape[-1] == 13]
    picked.sum().backward()
    assert sorted(calls) == [10, 10, 20, 20, 20, 20]

    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        torch.log_softmax(head(hidden), -1).sum()
    assert (50, 13) in saved


def test_no_positions_give_an_empty_result_that_still_has_a_gradient():
    head, hidden, targets = head_and_states()
    hidden.requires_grad_()
    picked, entropy = selected_logprobs(hidden[:0], head, targets[:0], with_entropy=True)
    assert entropy is not None
    assert picked.shape == entropy.shape == (0,)
    picked.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.eq(0).all()


def test_sequence_logps_ignores_what_is_masked():
    logprobs = torch.tensor([[0.0, -1.0, -2.0, torch.nan], [torch.inf, -0.5, -torch.inf, 9.0], [1.0, 2.0, 3.0, 4.0]])
    mask = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    assert sequence_logps(logprobs, mask).tolist() == [-3.0, -0.5, 0.0]


def test_refusals():
    logits, ids = random_logits(0)
    with pytest.raises(ValueError, match="temperature: got 0"):
        token_logprobs(logits, ids, temperature=0.0)
    with pytest.raises(ValueError, match=r"expected \(B, T, V\) and \(B, T\)"):
        token_logprobs(logits, ids[:, 1:])
    with pytest.raises(ValueError, match=r"expected \(N, d\) and \(N,\)"):
        selected_logprobs(torch.ones(3, 2), nn.Linear(2, 4), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="chunk_size: got 0"):
        selected_logprobs(torch.ones(3, 2), nn.Linear(2, 4), torch.zeros(3, dtype=torch.long), chunk_size=0)

"""Losses of pairs against golden arrays, closed forms, and every way to split a batch (P34)."""

from __future__ import annotations

import math

import pytest
import torch

from alignment.losses import cpo_loss, dpo_loss, orpo_loss, simpo_loss
from alignment.preference_losses import chosen_sft_loss, length_desensitised_logps
from alignment.preference_objectives import PairLogps, PreferenceObjective, Term

LN2 = math.log(2)
ZERO = torch.zeros(4, dtype=torch.float64)


def at(gaps, **settings):
    """dpo_loss of each pair alone, from the gap h of its log-ratios."""
    gaps = torch.as_tensor(gaps, dtype=torch.float64)
    return [dpo_loss(gap[None], ZERO[:1], ZERO[:1], ZERO[:1], **{"beta": 0.1, **settings})[0].item() for gap in gaps]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.6931472, 0.3132617, 0.126928, 1.3132617]),
        ({"label_smoothing": 0.1}, [0.6931472, 0.4132617, 0.326928, 1.2132617]),
        ({"variant": "robust", "label_smoothing": 0.1}, [0.6931472, 0.1882617, -0.123072, 1.4382617]),
        ({"variant": "hinge"}, [1, 0, 0, 2]),
    ],
)
def test_golden_by_gap(settings, expected):
    assert at([0.0, 10.0, 20.0, -10.0], **settings) == pytest.approx(expected, abs=1e-6)


def test_ipo_golden():
    assert at([0.0, 1.0, 5.0, 10.0], variant="ipo") == pytest.approx([25, 16, 0, 25])


def test_torchtune_golden():
    chosen, rejected = torch.tensor([-0.5, -10, -1]), torch.tensor([-0.1, -30, -21])
    reference = torch.tensor([-0.5, -10.1, -0.1]), torch.tensor([-0.1, -20.1, -0.1])
    rows = [slice(i, i + 1) for i in range(3)]
    losses = [dpo_loss(chosen[i], rejected[i], reference[0][i], reference[1][i], beta=0.1)[0].item() for i in rows]
    assert losses == pytest.approx([0.6931, 0.3133, 0.1269], abs=1e-4)
    _, metrics = dpo_loss(chosen, rejected, *reference, beta=0.1)
    told = {name: value.item() for name, value in metrics.items()}
    assert told == pytest.approx(
        {
            "rewards/chosen": 0.1 * (0 + 0.1 - 0.9) / 3,
            "rewards/rejected": 0.1 * (0 - 9.9 - 20.9) / 3,
            "accuracy": 2 / 3,  # of the first pair both rewards are 0, and a tie is wrong
            "margin": 0.1 * (0 + 10 + 20) / 3,
            "logps/chosen": -11.5 / 3,
            "logps/rejected": -51.1 / 3,
        },
        abs=1e-6,
    )


def test_lengths_make_means_of_sums():
    """Gaps by token 40 / 8 - 6 / 3 = 3: -log sigmoid(0.3), and (3 - 5)^2."""
    chosen, rejected, zero = torch.tensor([40.0]), torch.tensor([6.0]), torch.zeros(1)
    lengths = {"chosen_lengths": torch.tensor([8]), "rejected_lengths": torch.tensor([3])}
    loss, metrics = dpo_loss(chosen, rejected, zero, zero, beta=0.1, **lengths)
    assert loss.item() == pytest.approx(0.5543552, abs=1e-6)
    assert metrics["margin"].item() == pytest.approx(0.3)
    assert metrics["logps/chosen"].item() == 40
    assert dpo_loss(chosen, rejected, zero, zero, beta=0.1, variant="ipo", **lengths)[0].item() == pytest.approx(4)


def test_simpo_by_hand():
    """2 (-1 - -1.5) - 0.4 = 0.6; ln(1 + e^-0.6) = 0.4374879."""
    loss, metrics = simpo_loss(
        torch.tensor([-4.0]), torch.tensor([-3.0]), torch.tensor([4]), torch.tensor([2]), beta=2.0, margin=0.4
    )
    assert loss.item() == pytest.approx(0.4374879, abs=1e-6)
    assert (metrics["rewards/chosen"].item(), metrics["rewards/rejected"].item()) == pytest.approx((-2, -3))


def test_cpo_is_dpo_with_a_uniform_reference():
    chosen, rejected = torch.tensor([-3.0, -9.0]), torch.tensor([-5.0, -2.0])
    uniform = torch.full((2,), -4.0)
    assert cpo_loss(chosen, rejected, beta=0.3)[0].item() == pytest.approx(
        dpo_loss(chosen, rejected, uniform, uniform, beta=0.3)[0].item()
    )
    # ln(1 + e^-0.6) and ln(1 + e^2.1).
    assert cpo_loss(chosen, rejected, beta=0.3)[0].item() == pytest.approx((0.4374879 + 2.2155) / 2, abs=1e-4)


def test_orpo_by_hand():
    """Odds of means 0.5 and 0.2 are 1 and 1/4: the log odds ratio is ln 4, -log sigmoid(ln 4) = ln 1.25."""
    sums = torch.tensor([3 * math.log(0.5)]), torch.tensor([2 * math.log(0.2)])
    loss, metrics = orpo_loss(*sums, torch.tensor([3]), torch.tensor([2]), beta=0.1)
    assert metrics["log_odds_ratio"].item() == pytest.approx(math.log(4), rel=1e-5)
    assert loss.item() == pytest.approx(0.1 * math.log(1.25), rel=1e-5)


@pytest.mark.parametrize("chosen", [0.0, -1e-9, -0.69, -0.70, -80.0, -1e4])
def test_orpo_stays_finite_where_a_probability_is_one_or_none(chosen):
    sums = torch.tensor([chosen], requires_grad=True)
    loss, _ = orpo_loss(sums, torch.tensor([-1.0]), torch.ones(1), torch.ones(1), beta=0.1)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(sums.grad).all()


def test_sft_term_is_a_mean_over_tokens():
    assert chosen_sft_loss(torch.tensor([-6.0, -1.0]), torch.tensor([4, 3])).item() == pytest.approx(1)


def test_length_desensitised_logps_by_hand():
    logprobs = torch.tensor([[9.0, -1.0, -2.0, -4.0, torch.nan], [9.0, 9.0, -1.0, -3.0, -5.0]])
    mask = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]).bool()
    common = torch.tensor([2, 3])
    assert length_desensitised_logps(logprobs, mask, common, alpha=0.5).tolist() == [-5, -9]
    assert length_desensitised_logps(logprobs, mask, common, alpha=1.0).tolist() == [-7, -9]
    assert length_desensitised_logps(logprobs, mask, common, alpha=0.0).tolist() == [-3, -9]
    with pytest.raises(ValueError, match=r"length_alpha: got 1\.5, expected 0 to 1"):
        length_desensitised_logps(logprobs, mask, common, alpha=1.5)


VARIANTS = [
    {},
    {"label_smoothing": 0.2},
    {"variant": "robust", "label_smoothing": 0.2},
    {"variant": "ipo"},
    {"variant": "hinge"},
]


def test_the_gradient_of_dpo_is_the_probability_of_being_wrong():
    chosen = torch.tensor([-1.0, 4.0, 0.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    dpo_loss(chosen, rejected, ZERO[:3], ZERO[:3], beta=0.5)[0].backward()
    expected = -0.5 * torch.sigmoid(-0.5 * chosen.detach()) / 3
    torch.testing.assert_close(chosen.grad, expected)
    torch.testing.assert_close(rejected.grad, -expected)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("settings", VARIANTS)
def test_gradients_are_those_of_finite_differences(settings, per_token):
    draw = torch.Generator().manual_seed(2)
    logps = [(3 * torch.randn(4, generator=draw, dtype=torch.float64)).requires_grad_() for _ in range(2)]
    reference = [torch.randn(4, generator=draw, dtype=torch.float64) for _ in range(2)]
    lengths = [torch.tensor([3, 1, 2, 5]), torch.tensor([2, 4, 1, 3])] if per_token else [None, None]

    def loss(*logps):
        return dpo_loss(
            *logps, *reference, beta=0.4, chosen_lengths=lengths[0], rejected_lengths=lengths[1], **settings
        )[0]

    assert torch.autograd.gradcheck(loss, logps)


def test_gradients_of_losses_without_a_reference():
    draw = torch.Generator().manual_seed(3)
    sums = [(-torch.rand(4, generator=draw, dtype=torch.float64) * 8 - 0.1).requires_grad_() for _ in range(2)]
    lengths = torch.tensor([3, 1, 2, 5]), torch.tensor([2, 4, 1, 3])
    for loss in (
        lambda *x: simpo_loss(*x, *lengths, beta=2.0, margin=0.5, label_smoothing=0.1)[0],
        lambda *x: cpo_loss(*x, beta=0.3)[0],
        lambda *x: orpo_loss(*x, *lengths, beta=0.3)[0],
    ):
        assert torch.autograd.gradcheck(loss, sums)


def test_no_gradient_reaches_the_reference():
    reference = torch.ones(2, requires_grad=True)
    policy = torch.zeros(2, requires_grad=True)
    dpo_loss(policy, policy.detach(), reference, reference, beta=0.1)[0].backward()
    assert reference.grad is None
    assert (policy.grad != 0).all()


@pytest.mark.parametrize("eps", [0.05, 0.3])
def test_conservative_optimum_is_where_the_model_is_as_sure_as_the_labels(eps):
    best = torch.tensor([math.log((1 - eps) / eps) / 0.1], dtype=torch.float64, requires_grad=True)
    dpo_loss(best, ZERO[:1], ZERO[:1], ZERO[:1], beta=0.1, label_smoothing=eps)[0].backward()
    assert best.grad.item() == pytest.approx(0, abs=1e-9)
    around = at([best.item() - 1, best.item(), best.item() + 1], label_smoothing=eps)
    assert around[1] < min(around[0], around[2])


def test_at_one_half_nothing_is_preferred():
    losses = at([-5.0, 0.0, 5.0], label_smoothing=0.5)
    assert losses[1] == pytest.approx(LN2)
    assert losses[0] == pytest.approx(losses[2])
    assert losses[0] > losses[1]


def test_robust_without_noise_is_dpo_and_with_it_unbiased():
    gaps = [-7.0, 0.5, 12.0]
    assert at(gaps, variant="robust") == at(gaps)
    eps = 0.2
    robust = {"variant": "robust", "label_smoothing": eps}
    right, flipped = at(gaps, **robust), at([-gap for gap in gaps], **robust)
    mean = [(1 - eps) * a + eps * b for a, b in zip(right, flipped, strict=True)]
    assert mean == pytest.approx(at(gaps))


@pytest.mark.parametrize("settings", VARIANTS)
def test_at_the_reference_nothing_is_told_apart_and_everything_is_learnt(settings):
    chosen = torch.tensor([-40.0, -7.0], requires_grad=True)
    rejected = torch.tensor([-9.0, -30.0], requires_grad=True)
    loss, metrics = dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), beta=0.1, **settings)
    loss.backward()
    if settings.get("variant") not in ("ipo", "hinge"):
        assert loss.item() == pytest.approx(LN2, abs=1e-6)
    assert metrics["margin"].item() == 0
    assert metrics["accuracy"].item() == 0
    assert (chosen.grad < 0).all()
    assert (rejected.grad > 0).all()


@pytest.mark.parametrize("settings", VARIANTS)
def test_extreme_gaps_stay_finite(settings):
    chosen = torch.tensor([-1e5, 1e5], requires_grad=True)
    loss, _ = dpo_loss(chosen, torch.zeros(2), torch.zeros(2), torch.zeros(2), beta=0.1, **settings)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(chosen.grad).all()


def test_half_precision_is_computed_in_float32():
    sums = torch.tensor([-300.0]).bfloat16(), torch.tensor([-301.0]).bfloat16()
    assert dpo_loss(*sums, sums[1], sums[1], beta=0.1)[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "kto_pair"}, r"variant: got 'kto_pair', expected one of \('sigmoid', 'robust', 'ipo', 'hinge'\)"),
        ({"variant": "ipo", "label_smoothing": 0.1}, "label_smoothing: got 0.1 with ipo, expected 0"),
        ({"variant": "robust", "label_smoothing": 0.5}, "label_smoothing: got 0.5, expected a share"),
        ({"label_smoothing": 0.6}, "label_smoothing: got 0.6, expected a share"),
        ({"beta": 0.0}, "beta: got 0.0, expected above 0"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        dpo_loss(ZERO, ZERO, ZERO, ZERO, **{"beta": 0.1, **settings})


def test_shapes_that_would_broadcast_are_refused():
    for wrong in range(4):
        sums = [torch.zeros(3)] * 4
        sums[wrong] = torch.zeros(3, 1)
        with pytest.raises(ValueError, match="shapes: got"):
            dpo_loss(*sums, beta=0.1)
    with pytest.raises(ValueError, match="shapes: got"):
        simpo_loss(torch.zeros(3), torch.zeros(3), torch.ones(3), torch.ones(1), beta=0.1, margin=0)


def pairs_of(count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    sums = [-10 * torch.rand(count, generator=draw) for _ in range(4)]
    lengths = [torch.randint(1, 9, (count,), generator=draw) for _ in range(2)]
    return PairLogps(sums[0], sums[1], *lengths, sums[2], sums[3])


def rows_of(pairs, rows):
    return PairLogps(*(getattr(pairs, name)[rows] for name in PairLogps.__slots__ if getattr(pairs, name) is not None))


EVERY_TERM = (
    Term(kind="sigmoid", weight=1.0),
    Term(kind="sigmoid", weight=0.5, per_token=True),
    Term(kind="robust", weight=0.3),
    Term(kind="ipo", weight=0.1, per_token=True),
    Term(kind="hinge", weight=0.2),
    Term(kind="cpo", weight=0.7),
    Term(kind="simpo", weight=0.4),
    Term(kind="orpo", weight=0.6),
    Term(kind="sft", weight=0.9),
)


def test_terms_add_up_by_their_weights():
    pairs = pairs_of(6)
    settings = {"beta": 0.2, "label_smoothing": 0.1, "margin": 0.4}
    whole, metrics = PreferenceObjective(terms=EVERY_TERM, **settings).loss(
        pairs, denominator=6, num_tokens=float(pairs.chosen_lengths.sum())
    )
    ref = pairs.ref_chosen, pairs.ref_rejected
    both, lengths = (pairs.chosen, pairs.rejected), (pairs.chosen_lengths, pairs.rejected_lengths)
    named = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
    expected = [
        1.0 * dpo_loss(*both, *ref, beta=0.2, label_smoothing=0.1)[0],
        0.5 * dpo_loss(*both, *ref, beta=0.2, label_smoothing=0.1, **named)[0],
        0.3 * dpo_loss(*both, *ref, beta=0.2, variant="robust", label_smoothing=0.1)[0],
        0.1 * dpo_loss(*both, *ref, beta=0.2, variant="ipo", **named)[0],
        0.2 * dpo_loss(*both, *ref, beta=0.2, variant="hinge")[0],
        0.7 * cpo_loss(*both, beta=0.2, label_smoothing=0.1)[0],
        0.4 * simpo_loss(*both, *lengths, beta=0.2, margin=0.4, label_smoothing=0.1)[0],
        0.6 * orpo_loss(*both, *lengths, beta=0.2)[0],
        0.9 * -pairs.chosen.sum() / lengths[0].sum(),
    ]
    assert whole.item() == pytest.approx(sum(map(float, expected)), rel=1e-6)
    assert metrics["loss/sft"].item() == pytest.approx(expected[-1].item() / 0.9, rel=1e-6)
    assert metrics["margin"].item() == dpo_loss(*both, *ref, beta=0.2)[1]["margin"].item()
    swapped, metrics = PreferenceObjective(terms=EVERY_TERM[::-1], **settings).loss(
        pairs, denominator=6, num_tokens=float(pairs.chosen_lengths.sum())
    )
    assert swapped.item() == pytest.approx(whole.item(), rel=1e-6)
    assert metrics["margin"].item() == orpo_loss(*both, *lengths, beta=0.2)[1]["margin"].item()


@pytest.mark.parametrize("sizes", [(1, 5), (2, 2, 2), (3, 1, 2)])
def test_parts_of_a_batch_add_up(sizes):
    pairs = pairs_of(6, seed=1)
    objective = PreferenceObjective(terms=EVERY_TERM, label_smoothing=0.1)
    count = {"denominator": 6, "num_tokens": float(pairs.chosen_lengths.sum())}
    whole, metrics = objective.loss(pairs, **count)
    parts = [objective.loss(rows_of(pairs, rows), **count) for rows in torch.arange(6).split(list(sizes))]
    assert sum(loss.item() for loss, _ in parts) == pytest.approx(whole.item(), rel=1e-5)
    for name, value in metrics.items():
        assert sum(part[name].item() for _, part in parts) == pytest.approx(value.item(), rel=1e-5, abs=1e-6)


def test_what_a_term_and_an_objective_refuse():
    with pytest.raises(ValueError, match="per_token: got it with simpo, expected a kind with a reference"):
        Term(kind="simpo", per_token=True)
    with pytest.raises(ValueError, match="kind: got 'dpo', expected one of"):
        Term(kind="dpo")
    with pytest.raises(ValueError, match=r"terms: got \['sft'\], expected one at least that compares"):
        PreferenceObjective(terms=(Term(kind="sft"),))
    with pytest.raises(ValueError, match=r"terms: got \[.sigmoid., .sigmoid.\], expected each once"):
        PreferenceObjective(terms=(Term(), Term(weight=2.0)))
    pairs = pairs_of(2)
    bare = PairLogps(pairs.chosen, pairs.rejected, pairs.chosen_lengths, pairs.rejected_lengths)
    with pytest.raises(ValueError, match="reference: got no log-probabilities with sigmoid"):
        PreferenceObjective().loss(bare, denominator=2, num_tokens=1)
    free = PreferenceObjective(terms=(Term(kind="simpo"), Term(kind="sft")))
    assert not free.uses_reference
    assert torch.isfinite(free.loss(bare, denominator=2, num_tokens=8)[0])

"""Where preferences of a whole population lead, on answers that can all be enumerated.

People prefer y to y' with probability sigmoid(r(y) - r(y')). The policy that minimises DPO's mean over all of them is
that of PPO with the same beta: pi*(y|x) = ref(y|x) exp(r(x, y) / beta) / Z(x) (Rafailov 2023, section 4). Every
mutation below leads elsewhere.
"""

from __future__ import annotations

import pytest
import torch
from toy import ANSWERS, NUM_PROMPTS, NUM_STATES, VOCAB, token_logps

from alignment.losses import dpo_loss

BETA = 0.5
FAR = 0.02


def problem():
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(NUM_PROMPTS * NUM_STATES, VOCAB, generator=draw).double() * 0.7
    reward = torch.randn(NUM_PROMPTS, len(ANSWERS), generator=draw).double() * 0.6
    return start, reward


def each(chosen, rejected, ref_chosen, ref_rejected, **settings):
    """The loss of every pair by itself, for a mean that weighs them."""

    def alone(*sums):
        return dpo_loss(*(x[None] for x in sums), beta=BETA, **settings)[0]

    return torch.vmap(alone)(chosen, rejected, ref_chosen, ref_rejected)


def distance(*, flipped=0.0, swap=False, scale=1.0, ref_scale=1.0, **settings) -> float:
    """Minimise the population's loss; the larger total variation to pi* of the two prompts.

    Args:
        flipped: share of preferences that are told the wrong way round.
        swap, scale, ref_scale: mutations: sides swapped, log-ratios and reference out of scale.
    """
    start, reward = problem()
    reference = token_logps(start).sum(-1)
    target = (reference + reward / BETA).softmax(-1)
    better, worse = torch.triu_indices(len(ANSWERS), len(ANSWERS), offset=1)
    preferred = torch.sigmoid(reward[:, better] - reward[:, worse])
    preferred = (1 - flipped) * preferred + flipped * (1 - preferred)
    sides = (worse, better) if swap else (better, worse)
    table = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [table], max_iter=300, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        logps, ref = scale * token_logps(table).sum(-1), ref_scale * reference
        sums = [x[:, side].flatten() for x in (logps, ref) for side in sides]
        there = each(sums[0], sums[1], sums[2], sums[3], **settings).view_as(preferred)
        back = each(sums[1], sums[0], sums[3], sums[2], **settings).view_as(preferred)
        loss = (preferred * there + (1 - preferred) * back).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = token_logps(table.detach()).sum(-1).exp()
    return float((found - target).abs().sum(-1).max() / 2)


def test_dpo_of_a_population_reaches_the_closed_form():
    start, reward = problem()
    reference = token_logps(start).sum(-1)
    before = (reference.exp() - (reference + reward / BETA).softmax(-1)).abs().sum(-1).max() / 2
    assert before > 0.3
    assert distance() < 1e-3


def test_robust_reaches_it_through_flipped_labels_and_dpo_does_not():
    assert distance(flipped=0.2, variant="robust", label_smoothing=0.2) < 1e-3
    assert distance(flipped=0.2) > FAR


@pytest.mark.parametrize(
    "mutation",
    [{"swap": True}, {"scale": 1 / 3}, {"ref_scale": 0.0}, {"ref_scale": -1.0}, {"label_smoothing": 0.1}],
    ids=["sides", "mean over tokens", "no reference", "sign of the reference", "smoothing of true labels"],
)
def test_mutations_lead_elsewhere(mutation):
    assert distance(**mutation) > FAR

"""The reference beside a policy: what it is at first, where it follows to, and that it is found again."""

from __future__ import annotations

import pytest
import torch
from tiny_preferences import LIMIT, loaded, pairs_of

from alignment.learners.dpo import pair_logps
from alignment.reference import AdapterReference, FrozenReference

PAIRS = pairs_of(4)


def said(model):
    return torch.tensor(pair_logps(model, PAIRS, limit=LIMIT))


def of(reference):
    with reference.model() as model:
        return said(model)


def moved(model, by):
    """Another policy: every trained number a little off."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.sign(torch.sin(torch.arange(parameter.numel()))).view_as(parameter))
    return said(model)


def policy_and_reference(tiny, kind):
    model = loaded(tiny / "policy", lora=kind == "adapter")
    if kind == "adapter":
        return model, AdapterReference(model)
    return model, FrozenReference(model, lambda: loaded(tiny / "policy").requires_grad_(False))


@pytest.mark.parametrize("kind", ["adapter", "copy"])
def test_it_stays_where_it_is_until_it_follows(tiny, tmp_path, kind):
    model, reference = policy_and_reference(tiny, kind)
    start = said(model)
    first = moved(model, 0.01)
    torch.testing.assert_close(of(reference), start)
    assert (first - start).abs().max() > 0.1
    reference.save(tmp_path, write=True)
    assert list(tmp_path.iterdir()) == [], "a checkpoint of the start needs no second model"

    reference.follow(1.0)
    second = moved(model, 0.01)
    assert torch.equal(of(reference), first)
    assert torch.equal(said(model), second), "the policy is itself again behind the block"
    reference.release()
    assert torch.equal(of(reference), first), "what has moved is not let go"


@pytest.mark.parametrize("kind", ["adapter", "copy"])
def test_a_checkpoint_brings_it_back(tiny, tmp_path, kind):
    model, reference = policy_and_reference(tiny, kind)
    start = said(model)
    moved(model, 0.01)
    reference.follow(1.0)
    kept = of(reference)
    reference.save(tmp_path, write=True)
    other_model, other = policy_and_reference(tiny, kind)
    moved(other_model, 0.03)
    other.load(tmp_path)
    assert torch.equal(of(other), kept)
    (tmp_path / "earlier").mkdir()
    other.load(tmp_path / "earlier")
    torch.testing.assert_close(of(other), start)


def test_a_share_of_the_way_is_a_mean_of_the_weights(tiny):
    model, reference = policy_and_reference(tiny, "copy")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved(model, 0.01)
    reference.follow(0.3)
    with reference.model() as copy:
        for name, p in copy.named_parameters():
            expected = 0.7 * start[name] + 0.3 * dict(model.named_parameters())[name]
            torch.testing.assert_close(p, expected)

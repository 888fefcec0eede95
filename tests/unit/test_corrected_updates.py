"""The policy's update where the sampler disagrees: weighted, the same however the batch is cut, or stopped."""

from __future__ import annotations

import pytest
import torch
from tiny_learners import critic_learner, gradients, policy_learner, rollouts_of, sampled_at, state

from alignment.experience import make_experience

CORRECTIONS = [
    {"kind": "token_tis", "cap": 1.5},
    {"kind": "sequence_tis", "cap": 3.0},
    {"kind": "icepop", "low": 0.7, "high": 1.6},
]


def disagreeing_experience(folder, *, offsets=0.5):
    """Eight responses whose sampler is off by a random number at each token; row 5 is excluded."""
    learner, rollouts = policy_learner(folder), rollouts_of(8)
    old, values = learner.logprobs(rollouts), critic_learner(folder).values(rollouts)
    generator = torch.Generator().manual_seed(7)
    sampled = [row + offsets * torch.randn(row.shape, generator=generator) for row in old]
    scores = [None if i == 5 else float(i) - 3 for i in range(8)]
    return make_experience(
        sampled_at(rollouts, sampled), scores, old, [row - 0.1 for row in old], values, kl_coef=0.05
    )


@pytest.mark.parametrize("method", ["update", "update_on_policy"])
@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda c: c["kind"])
def test_a_corrected_gradient_is_that_of_the_whole_batch(tiny, correction, method):
    experience, described = disagreeing_experience(tiny / "policy")
    found, seen = [], []
    for size in (8, 3, 1):
        learner = policy_learner(tiny / "policy", micro_batch_size=size, correction=correction)
        found.append(gradients(learner, lambda: seen.append(getattr(learner, method)(experience, step=0))))  # noqa: B023
    for gradient, metrics in zip(found[1:], seen[1:], strict=True):
        assert metrics == pytest.approx(seen[0], rel=1e-4, abs=1e-5)
        for a, b in zip(found[0], gradient, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    fraction = next(
        value for name, value in seen[0].items() if name.endswith(("truncated_fraction", "masked_fraction"))
    )
    assert 0 < fraction < 1
    if method == "update_on_policy":
        # The trainer's own forward measures what the separate one did.
        names = [
            name for name in described if name.startswith(("rollout/logprob", "rollout/ratio", "rollout/effective"))
        ]
        assert len(names) == 4
        assert {name: seen[0][name] for name in names} == pytest.approx(
            {name: described[name] for name in names}, 1e-4
        )
    plain = policy_learner(tiny / "policy")
    uncorrected = gradients(plain, lambda: getattr(plain, method)(experience, step=0))
    assert max(float((a - b).abs().max()) for a, b in zip(uncorrected, found[0], strict=True)) > 1e-3


@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda c: c["kind"])
def test_one_pass_is_corrected_like_the_ordinary_update(tiny, correction):
    experience, _ = disagreeing_experience(tiny / "policy")
    found = []
    for method in ("update", "update_on_policy"):
        learner = policy_learner(tiny / "policy", correction=correction)
        found.append(gradients(learner, lambda: getattr(learner, method)(experience, step=0)))  # noqa: B023
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda c: c["kind"])
def test_padding_does_not_reach_a_corrected_gradient(tiny, correction):
    experience, _ = disagreeing_experience(tiny / "policy")
    dirty = {name: getattr(experience, name).clone() for name in type(experience).__slots__}
    for name in ("old_logprobs", "rollout_logprobs", "advantages"):
        dirty[name][~experience.response_mask] = float("nan")
    found = []
    for given in (experience, type(experience)(**dirty)):
        learner = policy_learner(tiny / "policy", correction=correction)
        found.append(gradients(learner, lambda: learner.update(given, step=0)))  # noqa: B023
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "correction",
    [{"kind": "token_tis", "cap": float("inf")}, {"kind": "sequence_tis", "cap": float("inf")}, {"kind": "icepop"}],
    ids=lambda c: c["kind"],
)
def test_a_sampler_that_agrees_is_not_corrected(tiny, correction):
    """Bit for bit, over several minibatches and epochs: metrics and weights of the model."""
    experience, _ = disagreeing_experience(tiny / "policy", offsets=0.0)
    found = []
    for given in (None, correction):
        learner = policy_learner(tiny / "policy", minibatch_size=4, ppo_epochs=2, correction=given)
        metrics = learner.update(experience, step=0)
        found.append(({name: v for name, v in metrics.items() if "correction" not in name}, state(learner)))
    assert found[0][0] == found[1][0]
    assert metrics["ppo/correction_weight_mean"] == pytest.approx(1, abs=1e-6)
    assert all(torch.equal(tensor, found[1][1][name]) for name, tensor in found[0][1].items())


@pytest.mark.parametrize("shift", [0.2, float("nan")])
def test_a_gap_above_the_limit_stops_one_pass_before_its_step(tiny, shift):
    learner, rollouts = policy_learner(tiny / "policy", logprob_gap_limit=0.1), rollouts_of(8)
    old = learner.logprobs(rollouts)
    sampled = [row + shift for row in old]
    zeros = [torch.zeros_like(row) for row in old]
    experience, _ = make_experience(sampled_at(rollouts, sampled), [1.0] * 8, old, old, zeros, kl_coef=0.0)
    before = state(learner)
    with pytest.raises(RuntimeError, match=r"step 4: got a mean gap of (0\.2|nan) .*rollout\.logprob_gap_limit=0\.1"):
        learner.update_on_policy(experience, step=4)
    assert learner.engine.num_updates == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in state(learner).items())

"""No answer depends on how a batch is cut or shared out: real Ray, 1, 2 and 3 ranks of tiny models, one session.

The learners' optimiser has an epsilon of 1, so that its first step is the gradient times the rate, nearly, and a loss
that is divided by the wrong count moves the weights by the wrong amount: with the usual epsilon Adam would hide it.
"""

from __future__ import annotations

import dataclasses
import sys

import pytest
import ray
import torch
from tiny_learners import rollouts_of, sampled_at

from actors import ActorGroup, CriticActor, PolicyActor, RewardModelActor
from actors.handles import CriticHandle, PolicyHandle, RewardHandle
from actors.launch import session
from actors.reward_training import RewardTrainingActor
from alignment import forward, models
from alignment.config import (
    CriticConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyConfig,
    PpoConfig,
    RewardConfig,
    RewardFunctionConfig,
    RewardModelTrainingConfig,
)
from alignment.distributed import balanced_parts
from alignment.experience import make_experience
from alignment.losses import ppo_policy_loss, ppo_value_loss, reward_model_loss
from alignment.types import PreferencePair

# The processes cannot import a module of the tests.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = pytest.mark.slow  # six process groups have to start
RANKS = (1, 2, 3)
RATE, EPSILON = 0.1, 1.0
OPTIMIZER = OptimizerConfig(lr=RATE, eps=EPSILON, warmup_ratio=0.0, decay="constant", max_grad_norm=1e9)
BY_ROWS = [{"micro_batch_size": size} for size in (1, 2, 4, 8)]
BY_TOKENS = [{"max_tokens_per_micro_batch": tokens} for tokens in (16, 45)]
SCORES = [None if i == 1 else (-1.0) ** i * (1 + i / 4) for i in range(12)]


class BeginsAgain:
    """A learner's actor that can be set up anew, with other micro-batches."""

    def begin(self, *, minibatch_size: int = 12, **limits: int) -> None:
        if hasattr(self, "ppo"):
            self.ppo = self.ppo.model_copy(update={"minibatch_size": minibatch_size})
        unset = {"micro_batch_size": None, "max_tokens_per_micro_batch": None}
        self.training = self.training.model_copy(update={**unset, **limits})
        self.setup({})

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def num_micro_batches(self, experience) -> int:
        rows = torch.arange(len(experience))
        return len(self.learner._own_micro_batches(rows, experience.attention_mask.sum(1)))


class Policy(BeginsAgain, PolicyActor):
    pass


class Critic(BeginsAgain, CriticActor):
    pass


class Training(BeginsAgain, RewardTrainingActor):
    pass


def actors_of(tiny):
    common = {"model": ModelConfig(), "total_updates": 20, "seed": 0}
    ppo = PpoConfig(minibatch_size=12)
    rewards = RewardConfig(model=str(tiny / "reward"), functions=(RewardFunctionConfig(name="text:no_repetition"),))
    path = str(tiny / "policy")
    return {
        "policy": Policy(
            model_path=path, policy=PolicyConfig(optimizer=OPTIMIZER), ppo=ppo, temperature=0.8, **common
        ),
        "critic": Critic(model_path=path, critic=CriticConfig(optimizer=OPTIMIZER), ppo=ppo, **common),
        "reward_model": RewardModelActor(model=ModelConfig(), reward=rewards),
        "training": Training(model_path=path, training=RewardModelTrainingConfig(optimizer=OPTIMIZER), **common),
    }


@pytest.fixture(scope="module")
def groups(tiny):
    """By number of ranks: each process has every role."""
    with session():
        made = {n: ActorGroup(actors_of(tiny), num_workers=n, cpus_per_worker=0.1, threads=1) for n in RANKS}
        for pending in [group.start() for group in made.values()]:
            pending.result()
        yield made
        for group in made.values():
            group.stop()


def weights_of(group, role):
    """Rank 0's, and the same bits on every rank."""
    first, *others = ray.get([worker.call.remote(role, "weights") for worker in group.workers])
    for other in others:
        assert all(torch.equal(other[name], tensor) for name, tensor in first.items())
    return first


def change(group, role, batch, *, minibatch_size=12, **limits):
    """What one `update` from the same start does to the weights, all in one vector, and its metrics."""
    group.call(role, "begin", minibatch_size=minibatch_size, **limits).result()
    before = weights_of(group, role)
    metrics = group.call(role, "update", batch, step=0).result()
    after = weights_of(group, role)
    return torch.cat([(after[name] - before[name]).flatten() for name in before]), metrics


def first_step(model, loss):
    """The closed form of AdamW's first step: -rate g / (|g| + epsilon)."""
    loss.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    return -RATE * flat / (flat.abs() + EPSILON)


def distance(ours, theirs):
    """As a share of the second's size."""
    return float((ours - theirs).norm() / theirs.norm())


def batch_of(count=12, scores=None):
    """Rollouts of 3 to 14 tokens, with old log-probabilities near the policy's own and random values."""
    rollouts = rollouts_of(count, seed=3)
    generator = torch.Generator().manual_seed(4)
    drawn = [torch.randn(2, len(r.response_ids), generator=generator) for r in rollouts]
    old, values = [-5 + 0.3 * row[0] for row in drawn], [row[1] for row in drawn]
    ref = [row - 0.1 for row in old]
    scores = SCORES[:count] if scores is None else scores
    return make_experience(sampled_at(rollouts, old), scores, old, ref, values, kl_coef=0.1, gae_lambda=0.9)[0]


def policy_step(tiny, batch):
    """One forward over the whole batch, padded, in this process."""
    model = models.load_causal_lm(str(tiny / "policy"))
    logprobs, _ = forward.response_logprobs(
        model, batch.input_ids, batch.attention_mask, batch.response_mask, temperature=0.8
    )
    loss, _ = ppo_policy_loss(logprobs, batch.old_logprobs, batch.advantages, batch.response_mask, clip_ratio=0.2)
    return first_step(model, loss)


def critic_step(tiny, batch):
    model = models.load_scalar_model(str(tiny / "policy"), head="zeros")
    values = forward.response_values(model, batch.input_ids, batch.attention_mask)
    loss, _ = ppo_value_loss(values, batch.old_values, batch.returns, batch.response_mask, value_clip=0.2)
    return first_step(model, loss)


STEPS = {"policy": policy_step, "critic": critic_step}


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("role", STEPS)
def test_every_cut_makes_the_step_of_the_whole_batch(tiny, groups, role, num_ranks):
    """Micro-batches of 1, 2, 4, 8 rows or of so many tokens; 5 to 12 of a rank's accumulate in the smallest."""
    batch = batch_of()
    expected = STEPS[role](tiny, batch)
    assert expected.norm() > 1e-3
    for limits in [*BY_ROWS, *BY_TOKENS]:
        assert distance(change(groups[num_ranks], role, batch, **limits)[0], expected) < 1e-4, limits


def test_a_smaller_budget_makes_more_micro_batches(groups):
    counts = []
    for tokens in (16, 45, 1000):
        groups[1].call("policy", "begin", max_tokens_per_micro_batch=tokens).result()
        counts.append(groups[1].call("policy", "num_micro_batches", batch_of()).result())
    assert counts[0] > counts[1] > counts[2] == 1


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("role", STEPS)
@pytest.mark.parametrize("count", [2, 3])
def test_ranks_with_no_valid_token_or_no_row_take_part(tiny, groups, role, num_ranks, count):
    """Row 1 is unscored: one rank has it alone, or with another; with two rows the third rank has none at all."""
    batch = batch_of(count)
    parts = balanced_parts(batch.attention_mask.sum(1).tolist(), num_ranks)
    tokens = [int(batch.response_mask[part].sum()) for part in parts]
    assert len(set(tokens)) > 1
    assert 0 in tokens or (num_ranks, count) == (2, 3)
    moved, metrics = change(groups[num_ranks], role, batch, micro_batch_size=1)
    assert distance(moved, STEPS[role](tiny, batch)) < 1e-4
    assert all(value == value for value in metrics.values())


@pytest.mark.parametrize("role", STEPS)
def test_rows_that_nobody_scored_are_free(groups, role):
    """Five more rows, longer than some that count, add nothing to loss, denominator or metrics."""
    few, many = batch_of(7), batch_of(12, scores=[*SCORES[:7], *[None] * 5])
    # Whitening is over the tokens that count, so it is the same in both.
    torch.testing.assert_close(many.advantages[:7, : few.advantages.shape[1]], few.advantages)
    expected, expected_metrics = change(groups[1], role, few, micro_batch_size=8)
    for num_ranks in RANKS:
        moved, metrics = change(groups[num_ranks], role, many, micro_batch_size=2)
        assert distance(moved, expected) < 1e-4
        assert metrics == pytest.approx(expected_metrics, rel=1e-4, abs=1e-5)
    nothing, _ = change(groups[2], role, batch_of(12, scores=[None] * 12), micro_batch_size=2)
    assert not nothing.any()


@pytest.mark.parametrize("role", STEPS)
def test_the_count_is_that_of_the_optimiser_step(groups, role):
    """Three steps of four rows, the last one of five alone: accumulating four times or once makes the same steps."""
    for minibatch_size in (4, 5):
        expected, _ = change(groups[1], role, batch_of(), minibatch_size=minibatch_size, micro_batch_size=8)
        for num_ranks, limits in ((1, BY_ROWS[0]), (2, BY_ROWS[0]), (3, BY_TOKENS[0])):
            moved, metrics = change(groups[num_ranks], role, batch_of(), minibatch_size=minibatch_size, **limits)
            assert distance(moved, expected) < 1e-3
            assert role == "critic" or metrics["ppo/updates_count"] == 3


def spoken(rollouts):
    """The same, with answers of different text and length for the reward model."""
    return [
        dataclasses.replace(rollout, response=" ".join(f"word{j}{i % 3}" for j in range(1 + 5 * i % 7)))
        for i, rollout in enumerate(rollouts)
    ]


@pytest.fixture(scope="module")
def alone(groups):
    """What one rank says of each rollout by itself: by its id, log-probabilities, values and scores."""
    rollouts = spoken(rollouts_of(12, seed=3))
    for role in STEPS:
        groups[1].call(role, "begin", micro_batch_size=1).result()
    group = groups[1]
    logprobs, values = PolicyHandle(group).logprobs(rollouts).result(), CriticHandle(group).values(rollouts).result()
    scores = [RewardHandle(group).score([rollout]).result()[0] for rollout in rollouts]
    numbers = zip(rollouts, logprobs, values, scores, strict=True)
    return {rollout.prompt.id: (own, value, score) for rollout, own, value, score in numbers}


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("limits", [{"micro_batch_size": 4}, {"max_tokens_per_micro_batch": 30}])
def test_numbers_stay_with_their_rollout(groups, alone, num_ranks, limits):
    """Shuffled, balanced by tokens, cut by rows or tokens: what comes back in place i is rollout i's."""
    group = groups[num_ranks]
    for role in STEPS:
        group.call(role, "begin", **limits).result()
    rollouts = spoken(rollouts_of(12, seed=3))
    assert len({round(score.total, 4) for _, _, score in alone.values()}) == 12
    for seed in (0, 1):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(seed)).tolist()
        shuffled = [rollouts[i] for i in order]
        logprobs, values = PolicyHandle(group).logprobs(shuffled), CriticHandle(group).values(shuffled)
        scores = RewardHandle(group).score(shuffled).result()
        for rollout, own, value, score in zip(shuffled, logprobs.result(), values.result(), scores, strict=True):
            expected = alone[rollout.prompt.id]
            torch.testing.assert_close(own, expected[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(value, expected[1], rtol=1e-5, atol=1e-5)
            assert score.total == pytest.approx(expected[2].total, abs=1e-4)
            assert score.parts == pytest.approx(expected[2].parts, abs=1e-4)


def test_advantages_are_whitened_over_all_ranks(groups):
    """Log-probabilities from 1, 2 and 3 ranks: the same advantages, of mean 0 and variance 1 over the whole batch."""
    rollouts = rollouts_of(12, seed=3)
    found = []
    for num_ranks in RANKS:
        for role in STEPS:
            groups[num_ranks].call(role, "begin", max_tokens_per_micro_batch=30).result()
        old = PolicyHandle(groups[num_ranks]).logprobs(rollouts).result()
        values = CriticHandle(groups[num_ranks]).values(rollouts).result()
        ref = [row - 0.1 for row in old]
        found.append(make_experience(rollouts, SCORES, old, ref, values, kl_coef=0.1)[0])
    advantages = found[0].advantages[found[0].response_mask]
    assert float(advantages.mean()) == pytest.approx(0, abs=1e-5)
    assert float(advantages.var(correction=0)) == pytest.approx(1, abs=1e-4)
    for experience in found[1:]:
        torch.testing.assert_close(experience.advantages, found[0].advantages, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_pairs_of_a_reward_model(tiny, groups, num_ranks):
    pairs = [
        PreferencePair(
            id=a.prompt.id, prompt_ids=a.prompt.prompt_ids, chosen_ids=a.response_ids, rejected_ids=b.response_ids
        )
        for a, b in zip(rollouts_of(7, seed=1), rollouts_of(7, seed=2), strict=True)
    ]
    model = models.load_scalar_model(str(tiny / "policy"), head="random", seed=0)
    scores = []
    for ids in [pair.prompt_ids + answer for pair in pairs for answer in (pair.chosen_ids, pair.rejected_ids)]:
        tokens = torch.tensor([ids])
        scores.append(forward.sequence_scores(model, tokens, torch.ones_like(tokens)))
    loss, _ = reward_model_loss(torch.cat(scores[::2]), torch.cat(scores[1::2]), center_coef=0.01)
    expected = first_step(model, loss)
    for limits in ({"micro_batch_size": 1}, {"micro_batch_size": 4}, {"max_tokens_per_micro_batch": 40}):
        moved, _ = change(groups[num_ranks], "training", pairs, **limits)
        assert distance(moved, expected) < 1e-4, limits

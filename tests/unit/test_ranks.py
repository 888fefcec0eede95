"""One learner on several ranks is one learner: same gradients, same metrics, whoever has which rows.

The ranks are threads of this process, each with its own model, over a real gloo group.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_learners import experience_of, rollouts_of
from torch import nn

from alignment import models
from alignment.distributed import Alone, GroupRanks, balanced_parts, own_rows, sum_gradients
from alignment.engines.torch import TorchEngine
from alignment.experience import make_experience
from alignment.learners.ppo import CriticLearner, PolicyLearner
from alignment.learners.reward_model import RewardModelLearner
from alignment.packing import MicroBatchLimit
from alignment.types import PreferencePair

WORLDS = (2, 3, 4)
TWO_ROWS = MicroBatchLimit(rows=2)


def on_ranks(size: int, work: Callable[[Any], Any]) -> list[Any]:
    """`work(ranks)` on every rank at the same time; their answers in order."""
    if size == 1:
        return [work(Alone())]
    store = dist.HashStore()

    def member(rank: int) -> Any:
        torch.set_num_threads(1)
        group = dist.ProcessGroupGloo(dist.PrefixStore(f"{size}", store), rank, size, timedelta(seconds=60))
        return work(GroupRanks(group))

    with ThreadPoolExecutor(size) as pool:
        return [future.result(120) for future in [pool.submit(member, rank) for rank in range(size)]]


def copied(model: models.HfModel) -> models.HfModel:
    """Loading is nothing for several threads at once."""
    inner = copy.deepcopy(model.model)
    pairs = zip(inner.modules(), model.model.modules(), strict=True)
    return models.HfModel(inner, next(copy_of for copy_of, own in pairs if own is model._head), model.layout)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def policy_update(tiny, **settings):
    """Two steps of two minibatches; weights and metrics."""

    start = models.load_causal_lm(str(tiny / "policy"))

    def work(ranks):
        model = copied(start)
        engine = TorchEngine(model.named_parameters(), lr=1e-3, total_updates=20, max_grad_norm=0.5, ranks=ranks)
        learner = PolicyLearner(model, engine, minibatch_size=6, micro_batch_limit=TWO_ROWS, **settings)
        experience = experience_of(rollouts_of(12, seed=3))
        return [learner.update(experience, step=step) for step in range(2)], state(model)

    return work


def critic_update(tiny):
    start = models.load_scalar_model(str(tiny / "policy"), head="random", seed=3)

    def work(ranks):
        model = copied(start)
        engine = TorchEngine(model.named_parameters(), lr=1e-3, total_updates=20, max_grad_norm=0.5, ranks=ranks)
        learner = CriticLearner(model, engine, minibatch_size=6, micro_batch_limit=TWO_ROWS)
        return [learner.update(experience_of(rollouts_of(12, seed=3)), step=0)], state(model)

    return work


def one_pass_update(tiny):
    """Both learners' one-pass updates, with the values that the critic returns."""

    starts = (
        models.load_causal_lm(str(tiny / "policy")),
        models.load_scalar_model(str(tiny / "policy"), head="random", seed=3),
    )

    def work(ranks):
        policy, critic = map(copied, starts)
        engine = TorchEngine(policy.named_parameters(), lr=1e-3, total_updates=20, max_grad_norm=0.5, ranks=ranks)
        learner = PolicyLearner(policy, engine, minibatch_size=12, micro_batch_limit=TWO_ROWS)
        rollouts = rollouts_of(12, seed=3)
        policy_metrics = learner.update_on_policy(experience_of(rollouts), step=0)
        engine = TorchEngine(critic.named_parameters(), lr=1e-3, total_updates=20, max_grad_norm=0.5, ranks=ranks)
        rewards = [
            torch.linspace(-1, 1, len(r.response_ids)) if i != 1 else torch.empty(0) for i, r in enumerate(rollouts)
        ]
        values, critic_metrics = CriticLearner(critic, engine, minibatch_size=12, micro_batch_limit=TWO_ROWS).fit(
            rollouts, rewards, gamma=1.0, gae_lambda=0.9
        )
        row = {"values": torch.cat(values)}
        return [policy_metrics, critic_metrics], state(policy) | {
            f"critic.{k}": v for k, v in state(critic).items()
        } | row

    return work


def reward_update(tiny):
    start = models.load_scalar_model(str(tiny / "reward"), head="random", seed=3)

    def work(ranks):
        model = copied(start)
        engine = TorchEngine(model.named_parameters(), lr=1e-3, total_updates=20, max_grad_norm=0.5, ranks=ranks)
        pairs = [
            PreferencePair(
                id=a.prompt.id, prompt_ids=a.prompt.prompt_ids, chosen_ids=a.response_ids, rejected_ids=b.response_ids
            )
            for a, b in zip(rollouts_of(7, seed=1), rollouts_of(7, seed=2), strict=True)
        ]
        return [RewardModelLearner(model, engine, micro_batch_limit=TWO_ROWS).update(pairs, step=0)], state(model)

    return work


UPDATES = {"policy": policy_update, "critic": critic_update, "one_pass": one_pass_update, "reward": reward_update}


@pytest.fixture(scope="module", params=UPDATES)
def update(request, tiny):
    """What every rank does, and what one process alone ends with."""
    work = UPDATES[request.param](tiny)
    return work, on_ranks(1, work)[0]


@pytest.mark.parametrize("size", WORLDS)
def test_any_number_of_ranks_ends_as_one(update, size):
    work, (metrics, weights) = update
    for got_metrics, got_weights in on_ranks(size, work):
        for ours, theirs in zip(got_metrics, metrics, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
        for name, weight in weights.items():
            assert torch.allclose(got_weights[name], weight, atol=1e-5), name


def test_all_ranks_have_the_same_bits(tiny):
    first, *others = on_ranks(3, policy_update(tiny))
    for metrics, weights in others:
        assert metrics == first[0]
        assert all(torch.equal(weights[name], weight) for name, weight in first[1].items())


def test_a_stop_by_kl_is_the_decision_of_all(tiny):
    alone = on_ranks(1, policy_update(tiny, kl_stop=1e-9, ppo_epochs=4))[0][0]
    assert alone[0]["ppo/updates_count"] < 8
    for metrics, _ in on_ranks(2, policy_update(tiny, kl_stop=1e-9, ppo_epochs=4)):
        assert [row["ppo/updates_count"] for row in metrics] == [row["ppo/updates_count"] for row in alone]


def test_ranks_without_a_row_take_part(tiny):
    """Two rows on four ranks."""

    start = models.load_causal_lm(str(tiny / "policy"))

    def work(ranks):
        model = copied(start)
        engine = TorchEngine(model.named_parameters(), lr=1e-3, total_updates=20, ranks=ranks)
        learner = PolicyLearner(model, engine, minibatch_size=2, micro_batch_limit=TWO_ROWS)
        rollouts = rollouts_of(2, seed=3)
        experience = make_experience(
            rollouts,
            [1.0, -1.0],
            *([torch.full((len(r.response_ids),), -1.0) for r in rollouts] for _ in range(3)),
            kl_coef=0.1,
            gamma=1.0,
            gae_lambda=0.9,
        )[0]
        return learner.update(experience, step=0), state(model)

    (metrics, weights), results = on_ranks(1, work)[0], on_ranks(4, work)
    for got_metrics, got_weights in results:
        assert got_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-5)
        assert all(torch.allclose(got_weights[name], weight, atol=1e-5) for name, weight in weights.items())


def test_a_gradient_that_is_not_finite_anywhere_is_skipped_everywhere():
    def work(ranks):
        parameter = nn.Parameter(torch.ones(3))
        engine = TorchEngine([("w", parameter)], lr=0.1, total_updates=5, ranks=ranks)
        engine.backward((parameter * (math.nan if ranks.rank == 1 else 1.0)).sum())
        return engine.step()["skipped_count"], parameter.detach().clone()

    for skipped, weight in on_ranks(2, work):
        assert skipped == 1
        assert torch.equal(weight, torch.ones(3))


def test_gradients_are_summed_and_only_those_that_somebody_has():
    def work(ranks):
        own, shared, unused = (nn.Parameter(torch.zeros(2)) for _ in range(3))
        shared.grad = torch.tensor([1.0, 10.0]) * (ranks.rank + 1)
        if ranks.rank == 2:
            own.grad = torch.tensor([5.0, 7.0])
        sum_gradients([own, shared, unused], ranks)
        return own.grad, shared.grad, unused.grad

    for own, shared, unused in on_ranks(3, work):
        assert own.tolist() == [5.0, 7.0]
        assert shared.tolist() == [6.0, 60.0]
        assert unused is None


def test_gathered_values_come_in_the_order_of_the_ranks():
    def work(ranks):
        return ranks.gather({"rank": ranks.rank, "nan": math.nan, "text": "x" * 10 * ranks.rank})

    for answer in on_ranks(3, work):
        assert [row["rank"] for row in answer] == [0, 1, 2]
        assert [len(row["text"]) for row in answer] == [0, 10, 20]
        assert all(math.isnan(row["nan"]) for row in answer)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
def test_parts_hold_every_row_once_and_about_the_same_number_of_tokens(parts):
    generator = torch.Generator().manual_seed(parts)
    lengths = torch.randint(1, 200, (40,), generator=generator).tolist()
    shares = balanced_parts(lengths, parts)
    assert sorted(i for share in shares for i in share) == list(range(40))
    tokens = [sum(lengths[i] for i in share) for share in shares]
    # Longest first is within 4/3 of the best (Graham 1969), which is at least the mean.
    assert max(tokens) <= 4 / 3 * max(sum(lengths) / parts, max(lengths)) + 1
    assert json.dumps(shares) == json.dumps(balanced_parts(lengths, parts))


def test_rows_of_a_minibatch_are_shared_out_by_their_own_lengths():
    @dataclasses.dataclass
    class Two(Alone):
        rank: int
        size: int = 2

    lengths, index = torch.tensor([9, 1, 1, 8, 7, 100]), torch.tensor([0, 3, 4, 1])
    # 9 goes to the first, 8 and 7 to the second, which is behind both times, and 1 to the first: 10 tokens and 15.
    assert [own_rows(index, lengths, Two(rank)).tolist() for rank in range(2)] == [[0, 1], [3, 4]]

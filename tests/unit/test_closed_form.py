"""The strongest check of PPO that needs no model: on an enumerable toy the real learner reaches the closed form.

max_pi E[r] - beta KL(pi || ref) has the solution pi*(y|x) = ref(y|x) exp(r(x, y) / beta) / Z(x). Two prompts, four
tokens, three steps: 64 answers each, all enumerable. Every mutation below is a bug that some project once shipped; the
gate has to see each of them.
"""

from __future__ import annotations

import pytest
import torch
from toy import ANSWERS, LENGTH, NUM_PROMPTS, NUM_STATES, VOCAB, TabularPolicy, replace, rollout_of

from alignment import experience as experience_module
from alignment.engines.torch import TorchEngine
from alignment.experience import make_experience
from alignment.learners import ppo as ppo_module
from alignment.learners.ppo import PolicyLearner
from alignment.packing import MicroBatchLimit

BETA = 0.5
PER_PROMPT, STEPS = 48, 120


def problem():
    torch.manual_seed(0)
    start = torch.randn(NUM_PROMPTS * NUM_STATES, VOCAB) * 0.7
    reward = torch.randn(NUM_PROMPTS, len(ANSWERS)) * 0.6
    reference = TabularPolicy(start)
    log_target = reference.answer_logps() + reward.double() / BETA
    return start, reward, reference, log_target.softmax(-1)


def exact_values(policy, reference, reward):
    """(prompts, 64, 3): what a perfect critic says before each token. With it the advantages of pi* are all 0."""
    own = policy.token_logps()
    left = reward.double().unsqueeze(-1) - BETA * (own - reference.token_logps()).flip(-1).cumsum(-1).flip(-1)
    values = torch.empty_like(left)
    weights = own.sum(-1).exp()
    for t in range(LENGTH):
        prefix = (ANSWERS[:, :t] * VOCAB ** torch.arange(t)).sum(-1)
        for group in prefix.unique():
            members = prefix == group
            share = weights[:, members] / weights[:, members].sum(-1, keepdim=True)
            values[:, members, t] = (share * left[:, members, t]).sum(-1, keepdim=True)
    return values.float()


def distance_after_training(*, steps=STEPS, mutate_experience=None) -> float:
    """Train with PPO from the reference; the larger total variation to pi* of the two prompts."""
    start, reward, reference, target = problem()
    policy = TabularPolicy(start)
    engine = TorchEngine(
        policy.named_parameters(),
        lr=0.1,
        total_updates=steps * 2,
        decay="linear",
        min_lr_ratio=0.01,
        max_grad_norm=100.0,
        betas=(0.9, 0.99),
    )
    batch = NUM_PROMPTS * PER_PROMPT
    learner = PolicyLearner(
        policy,
        engine,
        minibatch_size=batch,
        micro_batch_limit=MicroBatchLimit(rows=batch),
        ppo_epochs=2,
        clip_ratio=0.2,
    )
    frozen = PolicyLearner(reference, engine, minibatch_size=batch, micro_batch_limit=MicroBatchLimit(rows=batch))
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        drawn = torch.multinomial(policy.answer_logps().exp(), PER_PROMPT, replacement=True, generator=generator)
        critic = exact_values(policy, reference, reward)
        rollouts, scores, values = [], [], []
        for prompt in range(NUM_PROMPTS):
            for answer in drawn[prompt].tolist():
                ids = tuple(ANSWERS[answer].tolist())
                rollouts.append(rollout_of(prompt, ids))
                scores.append(float(reward[prompt, answer]))
                values.append(critic[prompt, answer])
        old, ref = learner.logprobs(rollouts), frozen.logprobs(rollouts)
        experience, _ = make_experience(
            rollouts, scores, old, ref, values, kl_coef=BETA, gae_lambda=0.95, whiten_advantages=False
        )
        learner.update(experience if mutate_experience is None else mutate_experience(experience), step=step)
    return float((policy.answer_logps().exp() - target).abs().sum(-1).max() / 2)


GATE = 0.01


def test_ppo_reaches_the_closed_form():
    start, _, _, target = problem()
    before = (TabularPolicy(start).answer_logps().exp() - target).abs().sum(-1).max() / 2
    assert before > 0.3
    assert distance_after_training() < GATE


SHORT = 60
"""Steps that are enough to see a policy go elsewhere."""
FAR = 0.1
"""After so few steps the right learner is nearer than this, see `test_a_short_training_comes_near`."""


def test_a_short_training_comes_near():
    assert distance_after_training(steps=SHORT) < FAR / 5


@pytest.mark.parametrize("factor", [0.0, -1.0], ids=["dropped", "sign"])
def test_kl_is_seen(monkeypatch, factor):
    original = experience_module.shaped_rewards

    def mutated(scores, logprobs, ref_logprobs, mask, *, kl_coef, **settings):
        return original(scores, logprobs, ref_logprobs, mask, kl_coef=factor * kl_coef, **settings)

    monkeypatch.setattr(experience_module, "shaped_rewards", mutated)
    assert distance_after_training(steps=SHORT) > FAR


def test_advantage_sign_is_seen():
    flipped = lambda e: replace(e, advantages=-e.advantages)  # noqa: E731
    assert distance_after_training(steps=SHORT, mutate_experience=flipped) > FAR


def test_reward_one_token_early_is_seen(monkeypatch):
    original = experience_module.shaped_rewards

    def early(scores, logprobs, ref_logprobs, mask, **settings):
        kl_only = original(torch.zeros_like(scores), logprobs, ref_logprobs, mask, **settings)
        kl_only[:, -2] += scores
        return kl_only

    monkeypatch.setattr(experience_module, "shaped_rewards", early)
    assert distance_after_training() > GATE


def pad_and_learn(experience, columns=2):
    """The mask switched off over padding: two more positions count, whose garbage values become advantages."""

    def wider(x, value):
        return torch.cat([x, value.expand(len(x), columns).to(x.dtype)], 1)

    ids = wider(experience.input_ids, torch.zeros(len(experience), 1))
    ones = torch.ones(len(experience), 1)
    padding = torch.full((len(experience), 1), -1.5)
    return replace(
        experience,
        input_ids=ids,
        attention_mask=wider(experience.attention_mask, ones),
        response_mask=wider(experience.response_mask, ones),
        old_logprobs=wider(experience.old_logprobs, padding),
        advantages=wider(experience.advantages, 0.5 * ones),
        **{
            name: wider(getattr(experience, name), 0 * ones)
            for name in ("rollout_logprobs", "ref_logprobs", "rewards", "old_values", "returns")
        },
    )


def test_mask_off_is_seen():
    assert distance_after_training(mutate_experience=pad_and_learn) > GATE


def test_prompt_in_the_loss_is_seen():
    def with_prompt(experience):
        mask, advantages = experience.response_mask.clone(), experience.advantages.clone()
        mask[:, 1] = True
        # No critic value stands before a prompt token: what follows it is all advantage.
        advantages[:, 1] = experience.returns[:, 2]
        old = experience.old_logprobs.clone()
        old[:, 1] = -1.4
        return replace(experience, response_mask=mask, advantages=advantages, old_logprobs=old)

    assert distance_after_training(mutate_experience=with_prompt) > GATE


def test_clip_sides_swapped_is_seen(monkeypatch):
    original = ppo_module.ppo_policy_loss

    def swapped(logprobs, old_logprobs, advantages, mask, *, clip_ratio, denominator, **_):
        ratio = (logprobs - old_logprobs).exp()
        other_bounds = torch.minimum(torch.maximum(ratio, torch.tensor(1 + clip_ratio)), torch.tensor(1 - clip_ratio))
        loss = (
            torch.where(mask, torch.maximum(-advantages * ratio, -advantages * other_bounds), 0.0).sum() / denominator
        )
        _, metrics = original(logprobs, old_logprobs, advantages, mask, clip_ratio=clip_ratio, denominator=denominator)
        return loss, metrics

    monkeypatch.setattr(ppo_module, "ppo_policy_loss", swapped)
    assert distance_after_training() > GATE

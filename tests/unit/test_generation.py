"""The embedded sampler: same sample whatever the batch, stops where it should, reports what it sampled."""

from __future__ import annotations

import pytest
import torch

from alignment import models
from alignment.generation import _pick, generate, gumbel_noise, sampling_seed
from alignment.logprobs import token_logprobs

SETTINGS = {"max_new_tokens": 12, "temperature": 0.9, "stop_ids": frozenset({2})}


def prompts_of(count):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(3, 200, (int(torch.randint(2, 9, (1,), generator=generator)),), generator=generator).tolist()
        for _ in range(count)
    ]


def test_a_sample_does_not_depend_on_the_batch_around_it(any_model_folder):
    model = models.load_causal_lm(str(any_model_folder))
    prompts, seeds = prompts_of(9), list(range(9))
    together = generate(model, prompts, seeds, **SETTINGS)
    in_threes = generate(model, prompts, seeds, max_batch=3, **SETTINGS)
    alone = [generate(model, [p], [s], **SETTINGS)[0] for p, s in zip(prompts, seeds, strict=True)]
    backwards = generate(model, prompts[::-1], seeds[::-1], **SETTINGS)[::-1]
    for other in (in_threes, alone, backwards):
        assert [s.response_ids for s in together] == [s.response_ids for s in other]
        assert [s.finish_reason for s in together] == [s.finish_reason for s in other]


def test_reported_logprobs_are_the_models_at_the_sampling_temperature(any_model_folder):
    model = models.load_causal_lm(str(any_model_folder))
    prompts = prompts_of(4)
    for prompt, sample in zip(prompts, generate(model, prompts, [5, 6, 7, 8], **SETTINGS), strict=True):
        ids = torch.tensor([prompt + list(sample.response_ids)])
        with torch.no_grad():
            expected = token_logprobs(model.model(input_ids=ids).logits, ids, temperature=0.9)[0, len(prompt) :]
        torch.testing.assert_close(torch.tensor(sample.rollout_logprobs), expected, rtol=1e-4, atol=1e-4)


def test_stop_tokens_end_the_answer_and_belong_to_it(tiny):
    model = models.load_causal_lm(str(tiny / "policy"))
    prompts, seeds = prompts_of(40), list(range(40))
    free = generate(model, prompts, seeds, max_new_tokens=12, temperature=1.0, stop_ids=frozenset())
    assert all(len(s.response_ids) == 12 and s.finish_reason == "length" for s in free)
    stops = frozenset(free[0].response_ids[3:4] + free[7].response_ids[5:6])
    stopped = generate(model, prompts, seeds, max_new_tokens=12, temperature=1.0, stop_ids=stops)
    for before, after in zip(free, stopped, strict=True):
        ends = [i for i, token in enumerate(before.response_ids) if token in stops]
        expected = before.response_ids[: ends[0] + 1] if ends else before.response_ids
        assert after.response_ids == expected
        assert after.finish_reason == ("stop" if ends else "length")
    assert any(s.finish_reason == "stop" for s in stopped)


def test_limits_of_their_own_cut_the_same_samples(any_model_folder):
    """Rows that end early leave the batch; nobody's tokens change, and a stop token counts before the limit does."""
    model = models.load_causal_lm(str(any_model_folder))
    prompts, seeds, limits = prompts_of(10), list(range(10)), [1, 12, 5, 2, 9, 12, 3, 7, 4, 11]
    whole = generate(model, prompts, seeds, **SETTINGS)
    cut = generate(model, prompts, seeds, **(SETTINGS | {"max_new_tokens": limits}))
    assert [s.response_ids for s in cut] == [s.response_ids[:n] for s, n in zip(whole, limits, strict=True)]
    ends = ["stop" if s.response_ids[-1] == 2 else "length" for s in cut]
    assert [s.finish_reason for s in cut] == ends


def test_a_stop_token_in_the_prompt_stops_nothing(tiny):
    model = models.load_causal_lm(str(tiny / "policy"))
    sample = generate(model, [[5, 2, 9]], [1], max_new_tokens=4, temperature=1.0, stop_ids=frozenset({2}))[0]
    assert sample.response_ids


def test_greedy_takes_the_most_likely_token(tiny):
    model = models.load_causal_lm(str(tiny / "policy"))
    ids = [5, 9, 30]
    sample = generate(model, [ids], [1], greedy=True, max_new_tokens=5, temperature=1.0, stop_ids=frozenset())[0]
    with torch.no_grad():
        for token in sample.response_ids:
            assert token == int(model.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            ids = [*ids, token]


def test_frequencies_follow_the_distribution(tiny):
    model = models.load_causal_lm(str(tiny / "policy"))
    count = 4000
    samples = generate(
        model,
        [[5, 9]] * count,
        list(range(count)),
        max_new_tokens=1,
        temperature=1.0,
        stop_ids=frozenset(),
        max_batch=500,
    )
    with torch.no_grad():
        expected = model.model(input_ids=torch.tensor([[5, 9]])).logits[0, -1].softmax(-1)
    seen = torch.bincount(torch.tensor([s.response_ids[0] for s in samples]), minlength=len(expected)) / count
    # Total variation of an empirical distribution over V outcomes is about sqrt(V / (2 pi count)).
    assert float((seen - expected).abs().sum() / 2) < 1.5 * (len(expected) / (6.283 * count)) ** 0.5


def test_seeds_differ_by_run_prompt_step_and_sample():
    seeds = {sampling_seed(r, p, s, i) for r in (1, 2) for p in ("a", "b") for s in (0, 1) for i in (0, 1)}
    assert len(seeds) == 16
    assert sampling_seed(1, "a", 0, 0) == sampling_seed(1, "a", 0, 0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_that_trains_can_be_sampled_from(tiny, checkpointing):
    model = models.load_causal_lm(str(tiny / "policy"))
    expected = generate(model, [[5, 9]], [3], **SETTINGS)
    if checkpointing:
        models.enable_gradient_checkpointing(model)
    assert generate(model, [[5, 9]], [3], **SETTINGS) == expected
    assert model.model.training == checkpointing


def test_noise_is_standard_gumbel_and_each_row_has_its_own_stream():
    streams = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    noise = gumbel_noise(torch.empty(2, 200_000), streams)
    # Mean is Euler's constant, variance pi^2 / 6; four standard errors of each.
    assert abs(noise.mean().item() - 0.577216) < 4 * 1.2825 / 400_000**0.5
    assert abs(noise.var().item() - 1.644934) < 4 * 3.44 / 400_000**0.5
    alone = gumbel_noise(torch.empty(1, 200_000), [torch.Generator().manual_seed(6)])
    assert torch.equal(alone[0], noise[1])
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    exact = -(-(-uniform).log1p()).log()
    # Below -2 lie the words that no draw ever picks; there 1 - u keeps few bits.
    torch.testing.assert_close(alone[0].double().clamp(min=-2), exact.clamp(min=-2), rtol=1e-4, atol=1e-4)


def test_rounding_hardly_ever_changes_a_token():
    """Logits of a language model's spread, moved by the 1e-5 that another batch size moves them."""
    torch.manual_seed(0)
    vocabulary, rows, changed = 20_000, 100, 0
    for trial in range(20):
        logits = 3 * torch.randn(rows, vocabulary)
        near = logits + 1e-5 * torch.randn(rows, vocabulary)
        tokens, _ = _pick(logits, [torch.Generator().manual_seed(trial * rows + i) for i in range(rows)], 1.0)
        again, _ = _pick(near, [torch.Generator().manual_seed(trial * rows + i) for i in range(rows)], 1.0)
        changed += int((tokens != again).sum())
    # Two best scores are hardly ever closer than the 1e-5; of 2,000 such draws a border for every word changed 9.
    assert changed <= 1


def test_cached_columns_equal_a_forward_over_everything(any_model_folder):
    """Greedy tokens and their log-probabilities, step by step, with rows of different lengths."""
    model = models.load_causal_lm(str(any_model_folder))
    prompts = [[5, 6, 7], [9], [11, 12, 13, 14, 15]]
    samples = generate(model, prompts, [0, 1, 2], max_new_tokens=9, temperature=1.0, stop_ids=frozenset(), greedy=True)
    for prompt, sample in zip(prompts, samples, strict=True):
        ids = torch.tensor([[*prompt, *sample.response_ids]])
        with torch.no_grad():
            logprobs = torch.log_softmax(model.model(input_ids=ids).logits[0].float(), -1)[len(prompt) - 1 : -1]
        torch.testing.assert_close(logprobs.max(-1).values, torch.tensor(sample.rollout_logprobs), atol=1e-4, rtol=0)

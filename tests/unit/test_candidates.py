"""Candidates behind one prompt have the log-probabilities that each has alone."""

from __future__ import annotations

import pytest
import torch
from tiny import write_tiny_model

from alignment import models
from alignment.candidates import candidate_logps, encode_candidates, implicit_rewards
from alignment.data.chat import load_tokenizer, question
from alignment.logprobs import token_logprobs
from alignment.shared_prompts import shares_prompts

TITLES = ["Alien (1979)", "Aliens (1986)", "Alien", "Il Postino (1994)", "M (1931)"]
MESSAGES = question("I liked these films: Heat (1995). Which film should I watch next?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("candidates") / "model")


@pytest.fixture(scope="module")
def group(folder):
    return encode_candidates(load_tokenizer(str(folder)), MESSAGES, TITLES)


def alone(model, prompt, answer):
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        return token_logprobs(model.model(input_ids=ids).logits, ids)[0, len(prompt) :].sum().item()


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("row_tokens", [1, 170, 10_000])
def test_each_is_what_it_is_alone(folder, group, share, row_tokens):
    model = models.load_causal_lm(str(folder))
    assert shares_prompts(model)
    found = candidate_logps(model, group, share_prompt=share, row_tokens=row_tokens)
    expected = [alone(model, group[0], answer) for answer in group[1]]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-5)
    assert found.shape == (5,)


def test_bfloat16_rounds_the_weights_and_little_else(folder, group):
    model = models.load_causal_lm(str(folder), dtype=torch.bfloat16)
    shared = candidate_logps(model, group, share_prompt=True)
    apart = candidate_logps(model, group, share_prompt=False)
    assert shared.dtype == torch.float32
    torch.testing.assert_close(shared, apart, rtol=0.02, atol=0.02)


def test_titles_that_begin_alike_all_end(folder, group):
    """Without its end token the shorter title could not be the less likely one."""
    prompt, answers = group
    assert len(prompt) > 60
    assert all(answer[-1] == load_tokenizer(str(folder)).eos_token_id for answer in answers)
    assert answers[2][:-1] == answers[0][: len(answers[2]) - 1]
    assert answers[2] != answers[0][: len(answers[2])]


def test_rewards_by_hand():
    logps, ref = torch.tensor([-3.0, -1.0]), torch.tensor([-2.0, -4.0])
    assert implicit_rewards(logps, ref, beta=0.1).tolist() == pytest.approx([-0.1, 0.3])

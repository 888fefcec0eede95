"""What the OpenAI-compatible endpoint answers, over real HTTP, on a real engine with a tiny model."""

from __future__ import annotations

import json

import pytest
import torch
from endpoints import MESSAGES, serving_actor, text

from actors.handles import RolloutHandle
from alignment.data.prompts import make_prompt


@pytest.fixture(scope="module")
def serving(tiny):
    with serving_actor(tiny) as made:
        yield made


def test_a_greedy_chat_is_what_the_run_samples(serving):
    code, answer = serving.chat()
    assert code == 200
    assert text(answer) == serving.greedy() != ""
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["finish_reason"] == "length"
    prompt = make_prompt(serving.actor.tokenizer, MESSAGES)
    used = {"prompt_tokens": len(prompt.prompt_ids), "completion_tokens": 12}
    assert answer["usage"] == used | {"total_tokens": sum(used.values())}


def test_models_lists_the_policy(serving):
    code, listed = serving.ask("/v1/models")
    assert code == 200
    assert [model["id"] for model in listed["data"]] == ["policy"]


def test_seeds_decide_and_choices_differ(serving):
    first, again, other = (serving.chat(temperature=1.0, seed=s, n=3)[1] for s in (5, 5, 6))
    answers = [[choice["message"]["content"] for choice in a["choices"]] for a in (first, again, other)]
    assert answers[0] == answers[1]
    assert len({*answers[0], *answers[2]}) == 6
    unseeded = {text(serving.chat(temperature=1.0)[1]) for _ in range(3)}
    assert len(unseeded) == 3


def test_completions_continue_text_and_ids_with_the_engines_logprobs(serving):
    tokenizer = serving.actor.tokenizer
    ids = tokenizer("Once upon")["input_ids"]
    _, answer = serving.complete(prompt=["Once upon", "A"], max_tokens=5, logprobs=0)
    _, same = serving.complete(prompt=ids, max_tokens=5)
    assert len(answer["choices"]) == 2
    assert answer["choices"][0]["text"] == same["choices"][0]["text"]
    assert same["choices"][0]["logprobs"] is None
    got = answer["choices"][0]["logprobs"]
    model = serving.actor.engine.model
    with torch.no_grad():
        for token, logprob in zip(got["tokens"], got["token_logprobs"], strict=True):
            input_ids = torch.tensor([ids])
            last = model.model(input_ids=input_ids).logits[0, -1].log_softmax(-1)
            assert logprob == pytest.approx(float(last.max()), abs=1e-4)
            ids = [*ids, int(last.argmax())]
            assert token == tokenizer.decode([ids[-1]])


def test_chat_logprobs_are_those_of_its_tokens(serving):
    _, answer = serving.chat(logprobs=True, max_completion_tokens=4)
    (rollout,) = serving.rollouts(greedy=True)
    content = answer["choices"][0]["logprobs"]["content"]
    decode = serving.actor.tokenizer.decode
    assert [item["token"] for item in content] == [decode([token]) for token in rollout.response_ids[:4]]
    assert [item["logprob"] for item in content] == pytest.approx(rollout.rollout_logprobs[:4], abs=1e-5)


def test_a_stop_token_ends_the_answer_and_is_not_shown(serving):
    free = text(serving.chat(max_tokens=100)[1])
    stop = next(c for c in free[2:] if c.isascii() and c.isprintable() and c not in free[:2])
    _, answer = serving.chat(max_tokens=100, stop=[stop], logprobs=True)
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == free[: free.index(stop)]
    assert choice["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == len(choice["logprobs"]["content"]) + 1


def test_a_stream_is_the_answer_in_events(serving):
    body = {"model": "policy", "messages": MESSAGES, "temperature": 0, "stream": True}
    code, stream = serving.raw("/v1/chat/completions", body | {"stream_options": {"include_usage": True}})
    assert code == 200
    lines = [line.removeprefix("data: ") for line in stream.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert "".join(c["delta"].get("content", "") for chunk in chunks for c in chunk["choices"]) == serving.greedy()
    assert [c["finish_reason"] for chunk in chunks for c in chunk["choices"]] == [None, "length"]
    assert chunks[-1]["usage"]["completion_tokens"] == 12


def test_the_version_moves_with_a_sync(serving):
    before = serving.chat()[1]
    serving.change_policy()
    serving.policy.send_weights(RolloutHandle(serving.group), version=serving.version).result()
    after = serving.chat()[1]
    assert (before["weight_version"], after["weight_version"]) == (serving.version - 1, serving.version)
    assert after["system_fingerprint"] == f"weight_version_{serving.version}"
    assert text(after) == serving.greedy() != text(before)

"""The endpoint on vLLM: its engine is called from another thread than the run's."""

from __future__ import annotations

import json
import socket
import urllib.request

import pytest
from tiny import write_tiny_model

from actors.handles import PolicyHandle, RolloutHandle
from actors.local import LocalGroup
from actors.policy import PolicyActor
from actors.rollout import RolloutActor
from alignment.config import ModelConfig, PolicyConfig, PpoConfig, RolloutConfig, VllmConfig
from alignment.data.prompts import make_prompt

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

MESSAGES = [{"role": "user", "content": "What helps against hay fever?"}]


def test_it_answers_with_the_runs_own_samples_before_and_after_a_sync(tmp_path):
    path = str(write_tiny_model(tmp_path / "model", hidden_size=64, num_attention_heads=2))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    model = ModelConfig(path=path)
    settings = VllmConfig(max_model_len=256, kv_cache_gb=0.1)
    rollout = RolloutActor(
        model_path=path,
        model=model,
        rollout=RolloutConfig(engine="vllm", max_new_tokens=12, endpoint_port=port, vllm=settings),
        seed=1,
    )
    policy = PolicyActor(
        model_path=path,
        model=model,
        policy=PolicyConfig(),
        ppo=PpoConfig(),
        temperature=1.0,
        total_updates=1,
        seed=1,
    )
    sender, receiver = LocalGroup({"policy": policy}), LocalGroup({"rollout": rollout})
    for group in (sender, receiver):
        group.start().result()

    def ask(**changes) -> dict:
        body = {"model": "policy", "messages": MESSAGES, "temperature": 0} | changes
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())

    def check(version: int) -> str:
        (expected,) = rollout.generate([make_prompt(rollout.tokenizer, MESSAGES)], step=0, greedy=True)
        answer = ask()
        assert answer["weight_version"] == expected.weight_version == version
        assert answer["choices"][0]["message"]["content"] == expected.response
        return expected.response

    before = check(0)
    policy.model.model.get_input_embeddings().weight.data.mul_(-1)
    PolicyHandle(sender).send_weights(RolloutHandle(receiver), version=1).result()
    assert check(1) != before
    seeded = [ask(temperature=1.0, seed=seed, n=2)["choices"] for seed in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]
    receiver.stop()
    rollout.engine.close()

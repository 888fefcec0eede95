"""The endpoint of Ray actors: the first engine serves, and the port goes with its process."""

from __future__ import annotations

import errno
import json
import socket
import urllib.request

import pytest

from actors.launch import ray_groups
from actors.rollout import RolloutActor
from alignment.config import ClusterConfig, ModelConfig, RolloutConfig
from alignment.data.chat import load_tokenizer
from alignment.data.prompts import make_prompt

MESSAGES = [{"role": "user", "content": "What helps against hay fever?"}]


def test_one_of_two_engines_serves_until_it_stops(tiny):
    path = str(tiny / "policy")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    actor = RolloutActor(
        model_path=path,
        model=ModelConfig(path=path),
        rollout=RolloutConfig(engine="transformers", max_new_tokens=12, endpoint_port=port),
        seed=1,
    )
    cluster = ClusterConfig.model_validate({"rollout": {"num_engines": 2}})
    with ray_groups({"rollout": actor}, cluster) as groups:
        prompts = [make_prompt(load_tokenizer(path), MESSAGES)] * 2  # one for each
        expected = groups["rollout"].scatter("rollout", "generate", prompts, step=0, greedy=True).result()
        body = json.dumps({"model": "policy", "messages": MESSAGES, "temperature": 0}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            said = json.loads(answer.read())
        assert said["choices"][0]["message"]["content"] == expected[0].response == expected[1].response
        with pytest.raises(ValueError, match=rf"got {port}.*expected a free port"):
            groups["rollout"].call("rollout", "_open_endpoint", port).result()
    with socket.socket() as caller:
        assert caller.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED

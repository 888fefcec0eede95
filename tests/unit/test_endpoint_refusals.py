"""What the endpoint does not do: take a bad request, let others in, quote a text, or open where it cannot."""

from __future__ import annotations

import errno
import json
import socket
import sys

import pytest
from endpoints import TIMEOUT, free_port, rollout_actor, serving_actor, text

from actors.local import LocalGroup
from actors.worker import Host


@pytest.fixture(scope="module")
def serving(tiny):
    with serving_actor(tiny) as made:
        yield made


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"model": "gpt-4"}, 404, "model: got 'gpt-4', expected 'policy'"),
        ({"messages": []}, 400, "messages: got an empty list, expected at least one message"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "expected a role of"),
        ({"messages": "hello"}, 400, "messages: got a str"),
        ({"temperature": "hot"}, 400, "temperature: got a str"),
        ({"temperature": -1}, 400, "temperature: got a int"),
        ({"top_p": 0.9}, 400, "top_p: got 0.9, expected 1"),
        ({"top_k": 40}, 400, "top_k: got 40, expected 0"),
        ({"top_logprobs": 3}, 400, "top_logprobs: got 3, expected 0"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty: got 0.5, expected 0"),
        ({"tools": []}, 400, "tools: got a parameter that is not known here"),
        ({"stop": "two words"}, 400, "stop: got 'two words', which is 9 tokens, expected one"),
        ({"n": 65}, 400, "n: got 65 answers to give, expected at most 64"),
        ({"max_tokens": 257}, 400, "max_tokens: got 257, expected at most 256"),
        ({"messages": [{"role": "user", "content": 400 * "x"}], "max_tokens": 200}, 400, "at most 512 together"),
        ({"temperature": 0.001}, 400, "temperature: got 0.001, expected 0 (greedy) or 0.01 to 100"),
        ({"temperature": 1e300}, 400, "temperature: got 1e+300, expected 0"),
        ({"max_tokens": 0}, 400, "max_tokens: got a int"),
    ],
)
def test_a_bad_request_is_refused_in_openais_form(serving, change, code, said):
    got, answer = serving.chat(**change)
    assert got == code
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error"
    assert said in answer["error"]["message"]
    assert all(word in answer["error"]["message"] for word in ("got", "expected", ";"))


@pytest.mark.parametrize(
    ("path", "body", "code", "said"),
    [
        ("/v1/chat/completions", b"{not json", 400, "no JSON"),
        ("/v1/chat/completions", {"model": "policy"}, 400, "messages: got none"),
        ("/v1/chat/completions", None, 405, "got GET /v1/chat/completions"),
        ("/v1/embeddings", {}, 404, "got POST /v1/embeddings"),
        ("/v1/completions", {"model": "policy", "prompt": []}, 400, "prompt: got none"),
        ("/v1/completions", {"model": "policy", "prompt": [5, 999]}, 400, "prompt: got token ids from 5 to 999"),
        ("/v1/completions", {"model": "policy", "prompt": "x", "logprobs": 5}, 400, "logprobs: got a int"),
    ],
)
def test_a_bad_path_or_body_is_refused_in_openais_form(serving, path, body, code, said):
    got, answer = serving.ask(path, body)
    assert got == code
    assert said in answer["error"]["message"]
    assert "expected" in answer["error"]["message"]


def test_neutral_values_that_clients_send_unasked_are_taken(serving):
    assert serving.chat(top_p=1, top_k=-1, presence_penalty=0, frequency_penalty=0.0, user="me")[0] == 200


def test_nobody_else_can_reach_it(serving):
    """No other address of this machine answers, and no name that a web page may point here."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as routed:
        routed.connect(("192.0.2.1", 9))  # sends nothing: names the address that packets would leave from
        outward = routed.getsockname()[0]
    for address in {"127.0.0.2", outward} - {"127.0.0.1"}:
        with socket.socket() as caller:
            assert caller.connect_ex((address, serving.port)) == errno.ECONNREFUSED
    assert serving.raw("/v1/models", Host="evil.example")[0] == 400


def test_prompts_and_answers_are_not_printed(serving, capfd, caplog):
    caplog.set_level("DEBUG")
    secret = "my left knee hurts"
    messages = [{"role": "user", "content": secret}]
    answer = text(serving.chat(messages=messages)[1])
    serving.chat(messages=messages, stop="two words")
    printed = "".join(capfd.readouterr()) + caplog.text
    assert secret not in printed
    assert answer not in printed


def test_a_failing_engine_says_so_without_quoting_anything(serving, monkeypatch, capfd, caplog):
    caplog.set_level("DEBUG")

    def break_down(*_):
        raise RuntimeError("while sampling: my left knee hurts")

    monkeypatch.setattr(serving.actor.engine, "generate", break_down)
    code, answer = serving.chat()
    assert (code, answer["error"]["type"]) == (500, "server_error")
    assert "RuntimeError" in answer["error"]["message"]
    assert "knee" not in json.dumps(answer) + "".join(capfd.readouterr()) + caplog.text
    monkeypatch.undo()
    assert serving.chat()[0] == 200


def test_a_taken_port_is_refused_and_free_again_once_the_actor_stops(tiny, serving):
    with pytest.raises(ValueError, match=rf"rollout\.endpoint_port: got {serving.port}.*expected a free port"):
        LocalGroup({"rollout": rollout_actor(tiny, serving.port)}).start()
    port = free_port()
    group = LocalGroup({"rollout": rollout_actor(tiny, port)})
    group.start().result()
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT):
        pass
    group.stop()
    with socket.socket() as caller:
        assert caller.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


def test_an_actor_whose_setup_failed_is_closed(tiny):
    actor = rollout_actor(tiny, free_port())
    actor.model_path = str(tiny / "nowhere")
    with pytest.raises((OSError, ValueError), match="nowhere"):
        actor.setup({})
    actor.close()


def test_only_the_first_of_many_engines_serves(tiny):
    port = free_port()
    actor = rollout_actor(tiny, port)
    Host({"rollout": actor}, rank=1).setup()
    assert actor.endpoint is None
    with socket.socket() as caller:
        assert caller.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


def test_a_sampler_on_the_policys_own_memory_is_refused(tiny, serving):
    policy = serving.policy.group.host.actors["policy"]
    with pytest.raises(ValueError, match="shares the policy's memory"):
        rollout_actor(tiny, free_port()).setup({"policy": policy})


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn"])
def test_without_its_packages_the_refusal_names_the_command(tiny, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "actors.endpoint")
    with pytest.raises(ValueError, match=rf'without {missing}.*pip install -e "\.\[serve\]"'):
        rollout_actor(tiny, free_port()).setup({})

"""The OpenAI-compatible endpoint over real HTTP, on a real engine with a tiny model."""

from __future__ import annotations

import errno
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from actors import endpoint as endpoint_module
from actors.handles import PolicyHandle, RolloutHandle
from actors.local import LocalGroup
from actors.openai_format import ChatBody
from actors.policy import PolicyActor
from actors.rollout import RolloutActor
from actors.turns import NotReadyError, Turns
from actors.worker import Host
from alignment.config import ModelConfig, PolicyConfig, PpoConfig, RolloutConfig
from alignment.data.prompts import make_prompt

MESSAGES = [{"role": "user", "content": "What helps against hay fever?"}]
TIMEOUT = 60
ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rollout_actor(tiny: Path, port: int | None, **changes) -> RolloutActor:
    path = str(tiny / "policy")
    return RolloutActor(
        model_path=path,
        model=ModelConfig(path=path),
        rollout=RolloutConfig(engine="transformers", max_new_tokens=12, endpoint_port=port, **changes),
        seed=1,
    )


@dataclass
class Serving:
    """A rollout actor that serves, the policy that it follows, and a client."""

    group: LocalGroup
    policy: PolicyHandle
    port: int
    version: int = 0

    @property
    def actor(self) -> RolloutActor:
        return self.group.host.actors["rollout"]

    def ask(self, path: str, body: object = None, **headers: str) -> tuple[int, dict]:
        code, text = self.raw(path, body, **headers)
        return code, json.loads(text)

    def raw(self, path: str, body: object = None, **headers: str) -> tuple[int, str]:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json", **headers}
        )
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as refusal:
            return refusal.code, refusal.read().decode()

    def chat(self, **changes) -> tuple[int, dict]:
        body = {"model": "policy", "messages": MESSAGES, "temperature": 0} | changes
        return self.ask("/v1/chat/completions", body)

    def complete(self, **changes) -> tuple[int, dict]:
        return self.ask("/v1/completions", {"model": "policy", "prompt": "Once", "temperature": 0} | changes)

    def rollouts(self, **changes):
        """What the run itself samples."""
        return self.actor.generate([make_prompt(self.actor.tokenizer, MESSAGES)], step=0, **changes)

    def greedy(self) -> str:
        return self.rollouts(greedy=True)[0].response

    def change_policy(self) -> None:
        generator = torch.Generator().manual_seed(self.version)
        with torch.no_grad():
            for parameter in self.policy.group.host.actors["policy"].model.model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        self.version += 1


@pytest.fixture(scope="module")
def serving(tiny):
    path = str(tiny / "policy")
    policy = PolicyActor(
        model_path=path,
        model=ModelConfig(path=path),
        policy=PolicyConfig(),
        ppo=PpoConfig(),
        temperature=1.0,
        total_updates=1,
        seed=1,
    )
    port = free_port()
    groups = LocalGroup({"policy": policy}), LocalGroup({"rollout": rollout_actor(tiny, port)})
    for group in groups:
        group.start().result()
    yield Serving(groups[1], PolicyHandle(groups[0]), port)
    groups[1].stop()


def text(answer: dict) -> str:
    return answer["choices"][0]["message"]["content"]


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


def test_a_request_during_a_sync_waits_and_meets_whole_weights(serving, monkeypatch):
    actor, sender = serving.actor, serving.policy.group.host.actors["policy"]
    arrived = threading.Event()
    wait_for_turn = actor.turns.request

    def request(**kwargs):
        arrived.set()
        return wait_for_turn(**kwargs)

    serving.change_policy()
    version = serving.version
    count = sender.plan_sync(whole=False)
    actor.begin_sync(version=version, buckets=count)
    monkeypatch.setattr(endpoint_module, "PATIENCE", 0.05)
    code, refusal = serving.chat()
    assert (code, refusal["error"]["code"]) == (503, "not_ready")
    monkeypatch.setattr(endpoint_module, "PATIENCE", TIMEOUT)
    monkeypatch.setattr(actor.turns, "request", request)
    answers: list[tuple[int, dict]] = []
    client = threading.Thread(target=lambda: answers.append(serving.chat()))
    client.start()
    assert arrived.wait(TIMEOUT)
    for index in range(count):
        actor.receive_bucket(sender.export_bucket(version=version, index=index, whole=False))
    assert answers == []
    actor.finish_sync(sender.probe(version=version), version=version)
    client.join(TIMEOUT)
    ((code, answer),) = answers
    assert (code, answer["weight_version"]) == (200, version)
    assert text(answer) == serving.greedy()


def test_patience_begins_when_a_request_arrives_not_when_those_before_it_are_done(serving):
    """Were each request given its time only once it is first in line, the tenth would wait ten times as long."""
    actor = serving.actor
    body = ChatBody(model="policy", messages=MESSAGES)
    with actor.turns.run(), pytest.raises(NotReadyError):
        actor.endpoint._speaker.chat(body, time.monotonic() - 1)
    assert serving.chat()[0] == 200


def test_a_process_can_end_while_a_request_is_answered():
    """A thread that the interpreter joins would keep it from ending."""
    code = (
        "import threading; from actors.endpoint import Computing; began = threading.Event(); "
        "Computing().submit(lambda: (began.set(), threading.Event().wait())); began.wait(); print('ends')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "ends\n")


def test_requests_wait_for_a_sleeping_engine(serving, monkeypatch):
    monkeypatch.setattr(endpoint_module, "PATIENCE", 0.05)
    serving.actor.sleep()
    assert serving.chat()[0] == 503
    serving.actor.wake()
    assert serving.chat()[0] == 200


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


def test_the_run_goes_before_requests_that_wait():
    turns, order = Turns(), []
    under_way, may_end = threading.Event(), threading.Event()

    def first():
        with turns.request(timeout=TIMEOUT):
            under_way.set()
            assert may_end.wait(TIMEOUT)
            order.append("first request")

    def second():
        with turns.request(timeout=TIMEOUT):
            order.append("second request")

    def run():
        with turns.run():
            order.append("run")

    threads = [threading.Thread(target=first)]
    threads[0].start()
    assert under_way.wait(TIMEOUT)
    for target, waiting in ((second, 1), (run, 2)):
        threads.append(threading.Thread(target=target))
        threads[-1].start()
        while turns.waiting < waiting:
            assert threads[-1].is_alive()
    may_end.set()
    for thread in threads:
        thread.join(TIMEOUT)
    assert order == ["first request", "run", "second request"]


def test_a_turn_ends_with_an_error_too_and_a_closed_queue_turns_away():
    turns = Turns()
    with pytest.raises(ZeroDivisionError), turns.run():
        raise ZeroDivisionError
    with turns.request(timeout=TIMEOUT):
        pass
    turns.close()
    with pytest.raises(NotReadyError), turns.request(timeout=TIMEOUT):
        pass

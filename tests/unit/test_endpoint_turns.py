"""Requests and the run take turns on the engine: who waits, for how long, and what a process's end does to them."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from endpoints import MESSAGES, TIMEOUT, serving_actor, text

from actors import endpoint as endpoint_module
from actors.openai_format import ChatBody
from actors.turns import NotReadyError, Turns

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def serving(tiny):
    with serving_actor(tiny) as made:
        yield made


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

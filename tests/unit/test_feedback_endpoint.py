"""Feedback by HTTP: accepted when it is on the disk, counted once, and nothing else let in."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

pytest.importorskip("fastapi")

from actors.feedback_endpoint import BODY_BYTES, FeedbackEndpoint
from alignment.feedback_log import FeedbackEvent, FeedbackLog, FeedbackReader

TIMEOUT = 60


def known(event: FeedbackEvent) -> None:
    if "Z" in event.shown:
        raise ValueError("shown: got an item that is not known, expected one of the catalogue; correct it")


@pytest.fixture
def log(tmp_path) -> FeedbackLog:
    return FeedbackLog(tmp_path / "feedback.jsonl")


@pytest.fixture
def endpoint(log) -> Iterator[FeedbackEndpoint]:
    with closing(FeedbackEndpoint(log, check=known)) as made:
        yield made


def choice(number: int, **changes) -> dict:
    return {"id": f"e{number}", "user": 7, "shown": ["A", "B"], "chosen": "B", **changes}


def ask(endpoint, body=None, *, path="/feedback", **headers) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", endpoint.port, timeout=TIMEOUT)
    with closing(connection):
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        method = "GET" if data is None else "POST"
        connection.request(method, path, data, {"Content-Type": "application/json", **named})
        answer = connection.getresponse()
        text = answer.read()
        return answer.status, json.loads(text) if text.startswith(b"{") else {}


def ids(log: FeedbackLog) -> list[str]:
    return [entry.event.id for entry in FeedbackReader(log.path).events()]


def test_what_was_accepted_is_on_the_disk_once(endpoint, log):
    assert ask(endpoint, choice(0)) == (202, {"new": 1, "known": 0})
    assert ids(log) == ["e0"]
    assert ask(endpoint, choice(0)) == (202, {"new": 0, "known": 1})
    assert ask(endpoint, {"events": [choice(1), choice(0), choice(2)]}) == (202, {"new": 2, "known": 1})
    assert ids(log) == ["e0", "e1", "e2"]
    assert ask(endpoint, path="/health") == (200, {"status": "ok", "events": 3})


def test_a_check_that_takes_long_holds_up_nobody_else(log):
    begun, others_done, waited = threading.Event(), threading.Event(), []

    def slow(event: FeedbackEvent) -> None:
        if event.id == "e0":
            begun.set()
            waited.append(others_done.wait(10))

    with closing(FeedbackEndpoint(log, check=slow)) as endpoint:
        answers: list[tuple[int, dict]] = []
        sender = threading.Thread(target=lambda: answers.append(ask(endpoint, choice(0))))
        sender.start()
        assert begun.wait(TIMEOUT)
        assert ask(endpoint, path="/health")[0] == 200
        assert ask(endpoint, choice(1))[0] == 202
        others_done.set()
        sender.join(TIMEOUT)
    assert waited == [True]
    assert (answers, ids(log)) == ([(202, {"new": 1, "known": 0})], ["e1", "e0"])


def test_many_at_once_have_one_order(endpoint, log):
    """Two clients send the same hundred events: each counts once."""
    answers: list[dict] = []

    def send() -> None:
        answers.extend(ask(endpoint, choice(i))[1] for i in range(100))

    senders = [threading.Thread(target=send) for _ in range(2)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join(TIMEOUT)
    assert sum(answer["new"] for answer in answers) == 100
    assert sorted(ids(log)) == sorted(f"e{i}" for i in range(100))


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{not json", 400, "body: got no JSON"),
        (b"[" * 5000, 400, "body: got no JSON"),
        (b"\xff\xfe", 400, "body: got no JSON"),
        ([], 400, "event: got a JSON list"),
        ({"events": []}, 400, "events: got none"),
        ({"events": [choice(i) for i in range(1001)]}, 413, "events: got 1001"),
        (choice(0, chosen="C"), 400, "chosen: got an item that is not in shown"),
        (choice(0, shown=["B", "Z"]), 400, "shown: got an item that is not known"),
        ({"events": [choice(0), choice(1, user="")]}, 400, "events[1]: user: got 0 characters"),
        (choice(0, more=1), 400, "event: got 'more'"),
        (b" " * (BODY_BYTES + 1), 413, "body: expected at most"),
    ],
)
def test_what_is_no_event_is_refused_whole(endpoint, log, body, status, said):
    got, answer = ask(endpoint, body)
    assert got == status
    assert said in answer["error"]
    assert ids(log) == []


def test_an_id_with_other_contents_is_a_conflict(endpoint, log):
    ask(endpoint, choice(0))
    got, answer = ask(endpoint, {"events": [choice(1), choice(0, chosen="A")]})
    assert got == 409
    assert "earlier event of other contents" in answer["error"]
    assert ids(log) == ["e0"]


def test_others_are_turned_away(endpoint, log):
    assert ask(endpoint, choice(0), Host="evil.example")[0] == 400
    assert ask(endpoint, choice(0), Content_Type="text/plain")[0] == 415
    assert ask(endpoint, path="/feedback")[0] == 405
    assert ask(endpoint, path="/docs")[0] == 404
    assert ids(log) == []


def test_a_token_is_asked_for(log):
    with closing(FeedbackEndpoint(log, check=known, token="s3cret")) as endpoint:
        assert ask(endpoint, choice(0))[0] == 401
        assert ask(endpoint, choice(0), Authorization="Bearer s3cres")[0] == 401
        assert ask(endpoint, choice(0), Authorization="Bearer s3cret")[0] == 202
    assert ids(log) == ["e0"]


def test_where_others_can_reach_it_a_token_is_needed(log):
    with pytest.raises(ValueError, match=r"got 0\.0\.0\.0 without a token"):
        FeedbackEndpoint(log, check=known, host="0.0.0.0")


def test_it_listens_on_loopback_alone_and_lets_go_of_its_port(log):
    endpoint = FeedbackEndpoint(log, check=known)
    with pytest.raises(ValueError, match=rf"^live\.port: got 127\.0\.0\.1:{endpoint.port} .* expected a free port"):
        FeedbackEndpoint(log, check=known, port=endpoint.port, key="live.port")
    endpoint.close()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", endpoint.port))

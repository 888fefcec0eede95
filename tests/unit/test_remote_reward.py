"""The client of a reward server against a real server with every fault planted: no fault becomes a number."""

from __future__ import annotations

import logging
import math
import pickle
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from planted_server import Planted, planted_server

from rewards.remote import RemoteReward
from rewards.transport import (
    BadAnswerError,
    JsonClient,
    RefusedError,
    RemoteError,
    UnavailableError,
    check_url,
    read_token,
    retry_after,
)

SECRET = "canary-token-5f1c"
TEXTS = ["my left knee hurts", "a second canary text"], ["rest it, says the answer", "and another answer"]
GOOD = Planted({"scores": [0.5, -2]})
QUICK = {"backoff": 0.001, "timeout": 5.0, "retries": 2}


def reward(url: str, **changes) -> RemoteReward:
    return RemoteReward(url=f"{url}/score", **QUICK | changes)


def test_scores_come_back_in_order_and_null_is_none():
    with planted_server(Planted({"scores": [None, 1e-3], "model": "x"})) as server:
        assert reward(server.url)(*TEXTS, answer=["A", "B"]) == [None, 0.001]
    ((path, headers, body),) = server.seen
    assert (path, body) == ("/score", {"prompts": TEXTS[0], "responses": TEXTS[1]})
    assert headers["Content-Type"] == "application/json"
    assert "Authorization" not in headers


def test_nothing_to_score_asks_nobody():
    with planted_server(GOOD) as server:
        assert reward(server.url)([], []) == []
    assert server.seen == []


def test_batches_and_named_columns_stay_aligned():
    def lengths(body):
        assert body.keys() == {"prompts", "responses", "columns"}
        assert body["columns"].keys() == {"topic"}
        return Planted(
            {"scores": [len(r) + t for r, t in zip(body["responses"], body["columns"]["topic"], strict=True)]}
        )

    responses = ["x" * i for i in range(23)]
    with planted_server(answer=lengths) as server:
        function = reward(server.url, batch_size=4, concurrency=3, columns=["topic"])
        scores = function(["q"] * 23, responses, topic=list(range(100, 123)), other=[None] * 23)
    assert scores == [100.0 + 2 * i for i in range(23)]
    assert sorted(len(body["responses"]) for _, _, body in server.seen) == [3, 4, 4, 4, 4, 4]


@pytest.mark.parametrize(
    "passing",
    [
        Planted(status=500),
        Planted(status=502, body=b"<html>bad gateway"),
        Planted(status=503, headers={"Retry-After": "0"}),
        Planted(status=408),
        Planted(status=429, headers={"Retry-After": "soon"}),
        Planted(silent=True),
        Planted(b'{"scores": [0.', length=40),
    ],
    ids=["500", "502", "503", "408", "429", "hangs up", "hangs up mid-body"],
)
def test_what_passes_is_tried_again_and_only_so_often(passing):
    with planted_server(passing, passing, GOOD) as server:
        assert reward(server.url)(*TEXTS) == [0.5, -2.0]
    assert len(server.seen) == 3
    with planted_server(passing) as server, pytest.raises(UnavailableError, match=r"got .* in 3 tries, expected .*; "):
        reward(server.url)(*TEXTS)
    assert len(server.seen) == 3


def test_a_server_that_is_not_there():
    with planted_server(GOOD) as server:
        url = server.url
    with pytest.raises(UnavailableError, match=r"no connection \(ConnectionRefusedError\) in 3 tries"):
        reward(url)(*TEXTS)


def test_a_silent_server_is_a_time_out_which_is_tried_again():
    slow = Planted(silent=True, then="hang")
    with planted_server(slow, GOOD) as server:
        assert reward(server.url, timeout=0.2)(*TEXTS) == [0.5, -2.0]
    with planted_server(slow) as server, pytest.raises(UnavailableError, match=r"no answer within 0\.1 s in 2 tries"):
        reward(server.url, timeout=0.1, retries=1)(*TEXTS)
    assert len(server.seen) == 2


FINAL = {
    "400": (Planted(status=400), RefusedError, "status 400"),
    "401": (Planted(status=401), RefusedError, "status 401, expected 200; name the server's token"),
    "404": (Planted(status=404), RefusedError, "status 404"),
    "redirect": (Planted(status=307, headers={"Location": "/score2"}), RefusedError, "a redirect is never followed"),
    "204": (Planted(status=204), RefusedError, "status 204"),
    "no JSON": (Planted(b"<html>0.5</html>"), BadAnswerError, "no JSON"),
    "no UTF-8": (Planted(b'{"scores": "\xff"}'), BadAnswerError, "no JSON"),
    "half": (Planted(b'{"scores": [0.5', length=-1), BadAnswerError, "no JSON"),
    "NaN": (Planted(b'{"scores": [0.5, NaN]}'), BadAnswerError, "no JSON"),
    "infinity": (Planted(b'{"scores": [0.5, 1e999]}'), BadAnswerError, "no JSON"),
    "twice": (Planted(b'{"scores": [0, 0], "scores": [1, 1]}'), BadAnswerError, "no JSON"),
    "deep": (Planted(b"[" * 4000), BadAnswerError, "no JSON"),
    "beyond float32": (Planted({"scores": [0.5, 1e39]}), BadAnswerError, "1e\\+39 as score 1"),
    "huge integer": (Planted({"scores": [0.5, 10**400]}), BadAnswerError, "a int that does not fit as score 1"),
    "bool": (Planted({"scores": [0.5, True]}), BadAnswerError, "True as score 1"),
    "string": (Planted({"scores": ["0.5", 0]}), BadAnswerError, "a str that does not fit as score 0"),
    "list": (Planted({"scores": [[0.5], 0]}), BadAnswerError, "a list that does not fit as score 0"),
    "short": (Planted({"scores": [0.5]}), BadAnswerError, "got 1 scores, expected 2"),
    "long": (Planted({"scores": [0.5, 1, 2]}), BadAnswerError, "got 3 scores, expected 2"),
    "no list": (Planted({"scores": {"0": 1, "1": 2}}), BadAnswerError, "scores of type dict"),
    "no scores": (Planted({"score": [0.5, 1]}), BadAnswerError, "scores of type NoneType"),
    "bare list": (Planted([0.5, 1]), BadAnswerError, "got a list"),
    "huge": (Planted(b" " * 5000 + b'{"scores": [1, 2]}'), BadAnswerError, "more than 4096 bytes"),
    "huge, unannounced": (Planted(b" " * 5000, length=-1), BadAnswerError, "more than 4096 bytes"),
    "says huge": (Planted(b" ", length=10**12, then="hang"), BadAnswerError, "more than 4096 bytes"),
    "hangs mid-body": (Planted(b'{"scores": [', length=30, then="hang"), BadAnswerError, "stopped in its middle"),
    "drips": (Planted(b'{"scores": [0.5, -2]}' + b" " * 3999, drip=0.02), BadAnswerError, "stopped in its middle"),
    "looks whole": (
        Planted(b'{"scores": [0.5, -2]}', length=-1, then="hang"),
        BadAnswerError,
        "stopped in its middle",
    ),
}


@pytest.mark.parametrize(("planted", "kind", "said"), FINAL.values(), ids=FINAL)
def test_what_does_not_pass_fails_at_once_by_name(planted, kind, said, caplog):
    caplog.set_level("DEBUG")
    began = time.monotonic()
    with planted_server(planted, GOOD) as server, pytest.raises(kind, match=said) as failure:
        reward(server.url, timeout=0.5, max_answer_bytes=4096)(*TEXTS)
    assert time.monotonic() - began < 40  # half of what the slow ones take if they are let
    assert len(server.seen) == 1
    message = str(failure.value)
    assert isinstance(failure.value, RemoteError)
    assert server.url in message
    assert all(word in message for word in ("got", "expected", "; "))
    assert caplog.text == ""


def test_one_bad_batch_of_many_is_no_partial_answer():
    def third_fails(body):
        return Planted(status=400) if body["prompts"] == ["2"] else Planted({"scores": [1.0]})

    with planted_server(answer=third_fails) as server, pytest.raises(RefusedError, match="status 400"):
        reward(server.url, batch_size=1)([str(i) for i in range(6)], ["r"] * 6)


def test_waits_grow_with_jitter_of_the_seed_and_obey_the_server_within_a_bound():
    def waits(seed: int) -> list[float]:
        client = JsonClient("http://127.0.0.1:1", backoff=0.5, max_wait=3.0, seed=seed)
        return [client._wait(attempt, 0.0) for attempt in range(6)]

    assert waits(1) == waits(1) != waits(2)
    for wait, whole in zip(waits(1), [0.5, 1, 2, 3, 3, 3], strict=True):
        assert whole / 2 <= wait <= whole
    client = JsonClient("http://127.0.0.1:1", backoff=0.5, max_wait=3.0)
    assert client._wait(0, 2.0) == 2.0
    assert client._wait(0, 3600.0) == 3.0
    assert retry_after("7") == 7.0
    in_an_hour = retry_after(format_datetime(datetime.now(UTC) + timedelta(hours=1)))
    assert 3590 < in_an_hour <= 3600
    assert [retry_after(header) for header in (None, "soon", "-5", "")] == [0.0] * 4


def test_retry_after_is_waited_for():
    busy = Planted(status=503, headers={"Retry-After": "60"})
    with planted_server(busy, GOOD) as server:
        began = time.monotonic()
        assert reward(server.url, max_wait=0.3)(*TEXTS) == [0.5, -2.0]
    assert time.monotonic() - began >= 0.3


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://example.com/score", "got http to example.com, expected https"),
        ("http://192.168.1.5/score", "expected https"),
        ("http://127.0.0.1.example.com/score", "expected https"),
        ("ftp://127.0.0.1/score", "got scheme 'ftp'"),
        ("127.0.0.1:8900/score", "remote.url"),
        ("https:///score", "host None"),
        ("http://127.0.0.1:99999/score", "cannot be read"),
        ("http://127.0.0.1/a b", "expected https://HOST/PATH"),
        (f"https://me:{SECRET}@example.com/score", "got a user or password"),
    ],
)
def test_addresses_that_texts_may_not_go_to(url, said):
    with pytest.raises(ValueError, match=said) as refusal:
        RemoteReward(url=url)
    assert SECRET not in str(refusal.value)


@pytest.mark.parametrize(
    "url", ["https://example.com/a", "http://127.0.0.1:1/a", "http://localhost/a", "http://[::1]:2/"]
)
def test_addresses_that_they_may(url):
    assert check_url(url).geturl() == url


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"timeout": 0}, "timeout 0"),
        ({"retries": -1}, "retries -1"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"concurrency": 0}, "concurrency 0"),
        ({"columns": "answer"}, "expected a list of names"),
        ({"ca_file": "/nowhere"}, "expected a file of certificates"),
        ({"token_env": "A", "token_file": "b"}, "expected one of them"),
    ],
)
def test_settings_that_cannot_be(changes, said):
    with pytest.raises(ValueError, match=said):
        RemoteReward(url="http://127.0.0.1:1/score", **changes)


def test_columns_that_do_not_fit_are_refused_before_anything_is_sent():
    with planted_server(GOOD) as server:
        function = reward(server.url, columns=["topic"])
        for columns in ({}, {"topic": [1]}):
            with pytest.raises(ValueError, match=r"remote\.columns: got .* of 'topic'"):
                function(*TEXTS, **columns)
        with pytest.raises(ValueError, match="values that JSON cannot hold"):
            function(*TEXTS, topic=[math.nan, 1])
        with pytest.raises(ValueError, match="2 prompts and 1 responses"):
            reward(server.url)(TEXTS[0], ["one"])
    assert server.seen == []


def test_the_token_comes_from_where_it_is_named_and_is_read_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("REWARD_TOKEN", SECRET)
    file = tmp_path / "token"
    file.write_text(f"{SECRET}-1\n")
    file.chmod(0o600)
    with planted_server(GOOD) as server:
        reward(server.url, token_env="REWARD_TOKEN")(*TEXTS)
        from_file = reward(server.url, token_file=str(file))
        from_file(*TEXTS)
        file.write_text(f"{SECRET}-2\n")
        from_file(*TEXTS)
    sent = [headers["Authorization"] for _, headers, _ in server.seen]
    assert sent == [f"Bearer {SECRET}", f"Bearer {SECRET}-1", f"Bearer {SECRET}-2"]


def test_a_token_that_others_can_read_or_that_is_none_is_refused_unseen(tmp_path, monkeypatch):
    file = tmp_path / "token"
    file.write_text(SECRET)
    for mode in (0o640, 0o604, 0o644):
        file.chmod(mode)
        with pytest.raises(ValueError, match=rf"got mode {mode:04o}, expected 0600.*chmod 600") as refusal:
            read_token(None, str(file))
        assert SECRET not in str(refusal.value)
    file.chmod(0o600)
    file.write_text(f"{SECRET}\r\nX-Admin: 1")
    with pytest.raises(ValueError, match="line breaks") as refusal:
        read_token(None, str(file))
    assert SECRET not in str(refusal.value)
    with pytest.raises(ValueError, match=r"got none \(No such file"):
        read_token(None, str(tmp_path / "none"))
    monkeypatch.delenv("REWARD_TOKEN", raising=False)
    with pytest.raises(ValueError, match="environment variable REWARD_TOKEN: got nothing"):
        read_token("REWARD_TOKEN", None)


def test_neither_token_nor_texts_are_in_logs_errors_copies_or_names(monkeypatch, caplog, capfd):
    """The server says both back in everything it sends."""
    monkeypatch.setenv("REWARD_TOKEN", SECRET)
    caplog.set_level(logging.DEBUG)
    said: list[str] = []

    def echo(status: int):
        return lambda body: Planted(f"{SECRET} {body}".encode(), status, {"Retry-After": SECRET, "X-Echo": SECRET})

    for status in (200, 301, 400, 401, 500):
        with planted_server(answer=echo(status)) as server:
            function = reward(server.url + f"/{status}", token_env="REWARD_TOKEN")
            with pytest.raises(RemoteError) as failure:
                function(*TEXTS)
            chain: BaseException | None = failure.value
            while chain is not None:
                said.append(f"{chain!r} {chain}")
                chain = chain.__cause__ or chain.__context__
            said += [repr(function), repr(function.client), repr(vars(function.client))]
            assert SECRET.encode() not in pickle.dumps(function)
    assert "status 500; try 2 follows" in caplog.text
    everything = " ".join([*said, caplog.text, *capfd.readouterr()])
    assert not [text for text in (SECRET, *TEXTS[0], *TEXTS[1]) if text in everything]

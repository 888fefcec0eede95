"""Where the choices of a live run come from, and the pairs that are made of them."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from tiny_films import table_of, write_recommender

from alignment.config.recommender import FeedbackConfig
from alignment.data.chat import load_tokenizer
from alignment.data.feedback_pairs import FeedbackPairs
from alignment.data.movielens import prompt_of
from alignment.data.movielens_live import live_choices
from alignment.feedback_log import FeedbackConsumer, FeedbackLog, FeedbackReader
from recipes.film_ranking import some_of
from recipes.live_learning import LivePairs
from recipes.live_sources import LOG_NAME, Sources


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    return write_recommender(tmp_path_factory.mktemp("recommender"), tiny / "policy")


@pytest.fixture(scope="module")
def choices(folder):
    return live_choices(table_of(folder / "tables").without_test(90), per_user=1)[0]


def live_pairs(folder, tiny, **settings) -> LivePairs:
    data = table_of(folder / "tables").without_test(90)
    tokenizer = load_tokenizer(str(tiny / "policy"))
    pairs = FeedbackPairs(tokenizer, title=data.title, liked=data.shown_titles, prompt=prompt_of)
    return LivePairs(pairs, **{"most": 2, "max_tokens": 200, **settings})


def test_some_pairs_of_a_choice_always_the_same(folder, tiny, choices):
    event = choices[0]
    whole = live_pairs(folder, tiny, most=99)(event)
    assert len(whole) == 9
    some = live_pairs(folder, tiny)(event)
    assert some == live_pairs(folder, tiny)(event)
    assert len(some) == 2
    assert [pair for pair in whole if pair in some] == some
    drawn = {tuple(some_of(9, 2, f"e{i}")) for i in range(200)}
    assert len(drawn) == 36  # every two of nine
    with pytest.raises(ValueError, match=r"liked, shown: got 1\d\d tokens of prompt and title, expected at most 20"):
        live_pairs(folder, tiny, max_tokens=20).check(event)


def test_a_source_that_fails_ends_the_run(folder, tiny, choices, tmp_path):
    """It would else wait for ever for a second choice. Here an id comes again with other contents."""
    consumer = FeedbackConsumer(tmp_path / LOG_NAME, batch_size=2, poll_seconds=0.001)
    replayed = [choices[0], replace(choices[0], user="nobody")]
    check = live_pairs(folder, tiny).check
    sources = Sources(FeedbackConfig(replay=True), tmp_path, consumer=consumer, replayed=replayed, check=check)
    with sources, ThreadPoolExecutor(1) as learner:
        taking = learner.submit(consumer.take, 0, after=None)
        assert wait([taking], timeout=60).done, "it waits for a second choice"
        consumer.stop()
        assert taking.result() == []
        with pytest.raises(ValueError, match="id: got one that an earlier event of other contents has"):
            sources.require_sound()
    consumer.close()
    assert [logged.event for logged in FeedbackReader(tmp_path / LOG_NAME).events()] == choices[:1]


def test_a_choice_of_a_client_is_no_replayed_one(folder, tiny, choices, tmp_path):
    """Who numbers choices by user and film says others than those of the replay, which goes on beside it."""
    consumer = FeedbackConsumer(tmp_path / LOG_NAME, batch_size=len(choices) + 1, poll_seconds=0.001)
    log = FeedbackLog(tmp_path / LOG_NAME)
    log.append([replace(one, id=f"{one.user}-{one.chosen}", liked=None) for one in choices[:1]])
    log.close()
    check = live_pairs(folder, tiny).check
    with Sources(FeedbackConfig(replay=True), tmp_path, consumer=consumer, replayed=choices, check=check) as sources:
        taken = consumer.take(0, after=None)
        sources.require_sound()
    consumer.close()
    assert [logged.event for logged in taken[1:]] == choices


class Later(list):
    """Choices whose replay begins when they are told to."""

    begin = threading.Event()
    looks = 0

    def __iter__(self):
        self.looks += 1
        assert self.looks == 1 or self.begin.wait(60)
        return super().__iter__()


def test_an_id_of_the_replay_is_nobody_elses(folder, tiny, choices, tmp_path):
    """It would take its place in the log, and every start would be refused from then on."""
    pytest.importorskip("fastapi")
    replayed = Later(choices)
    consumer = FeedbackConsumer(tmp_path / LOG_NAME, batch_size=len(choices) + 1, poll_seconds=0.001)
    config, check = FeedbackConfig(replay=True, port=0), live_pairs(folder, tiny).check
    with Sources(config, tmp_path, consumer=consumer, replayed=replayed, check=check) as sources:
        for event, status in ((replace(choices[-1], user="nobody"), 400), (replace(choices[0], id="own"), 202)):
            connection = http.client.HTTPConnection("127.0.0.1", sources.endpoint.port, timeout=60)
            with closing(connection):
                body = json.dumps(asdict(event))
                connection.request("POST", "/feedback", body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                said = answer.read().decode()
                assert answer.status == status
                assert ("id: got one that a replayed choice has" in said) == (status == 400)
        replayed.begin.set()
        taken = consumer.take(0, after=None)
        sources.require_sound()
    consumer.close()
    assert [logged.event for logged in taken] == [replace(choices[0], id="own"), *choices]


def test_a_port_in_use_is_refused_by_the_name_of_its_setting(folder, tiny, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config, consumer = FeedbackConfig(port=port), FeedbackConsumer(tmp_path / LOG_NAME, batch_size=1)
        with pytest.raises(ValueError, match=rf"^live\.port: got 127\.0\.0\.1:{port} .*choose another$"):
            Sources(config, tmp_path, consumer=consumer, replayed=(), check=live_pairs(folder, tiny).check)
    FeedbackLog(tmp_path / LOG_NAME).close()


def test_replayed_choices_are_logged_once(folder, tiny, choices, tmp_path):
    check = live_pairs(folder, tiny).check
    for _ in range(2):
        consumer = FeedbackConsumer(tmp_path / LOG_NAME, batch_size=len(choices), poll_seconds=0.001)
        with Sources(
            FeedbackConfig(replay=True), tmp_path, consumer=consumer, replayed=choices, check=check
        ) as sources:
            taken = consumer.take(0, after=None)
            sources.require_sound()
        consumer.close()
        assert [logged.event for logged in taken] == choices
    assert len(list(FeedbackReader(tmp_path / LOG_NAME).events())) == len(choices)

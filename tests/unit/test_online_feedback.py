"""A learner on live feedback: wherever it is killed, it ends with the weights of one that was left alone."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import pytest
import tiny_feedback
import torch
from tiny_feedback import POINTS, KilledError, event, fill, killed_at, learn, make_pairs

from actors.local import Done
from alignment.data.chat import decode, load_tokenizer
from alignment.data.movielens import prompt_of
from alignment.feedback_log import FeedbackLog

ROOT = Path(__file__).resolve().parents[2]
NUM_EVENTS = 7
"""Three steps of two, and one event that waits."""


@pytest.fixture(scope="module")
def model(tiny) -> Path:
    return tiny / "policy"


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    """Weights, state and metrics of a run that nobody stopped."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("undisturbed")
    fill(folder / "log.jsonl", range(NUM_EVENTS))
    trainer, state = learn(model, folder / "log.jsonl", folder / "run")
    return trainer.weights(), state, metrics(folder / "run")


def metrics(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("timing/")} for row in rows]


def assert_same(trainer, state, folder, undisturbed) -> None:
    weights, expected, rows = undisturbed
    assert state == expected
    assert all(torch.equal(p, weights[name]) for name, p in trainer.weights().items())
    assert metrics(folder) == rows


def test_each_event_is_learnt_once(undisturbed, model):
    weights, state, rows = undisturbed
    assert (state.step, state.next_event, state.last_id, state.num_pairs) == (3, 6, "e5", 12)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert [row["feedback/events"] for row in rows] == [2, 4, 6]
    start = tiny_feedback.Trainer(model, tiny_feedback.no_fault).weights()
    moved = {name for name, p in weights.items() if not torch.equal(p, start[name])}
    assert moved
    assert all("lora" in name for name in moved)


def test_what_no_step_was_made_of_is_not_called_learnt(model, tmp_path, monkeypatch):
    """A reference of nan in the second step: its gradient is not finite, its two events are taken all the same."""
    ask = tiny_feedback.Trainer.ref_logps

    def sometimes_nan(self, pairs):
        return Done([(math.nan, 0.0)] * len(pairs)) if self.step == 1 else ask(self, pairs)

    monkeypatch.setattr(tiny_feedback.Trainer, "ref_logps", sometimes_nan)
    fill(tmp_path / "log.jsonl", range(NUM_EVENTS))
    _, state = learn(model, tmp_path / "log.jsonl", tmp_path / "run")
    assert (state.step, state.next_event, state.num_skipped, state.num_pairs) == (3, 6, 2, 8)
    assert [row["feedback/skipped_count"] for row in metrics(tmp_path / "run")] == [0, 2, 2]


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("step", [0, 2])
def test_killed_anywhere_it_ends_alike(model, tmp_path, undisturbed, point, step):
    log, out = tmp_path / "log.jsonl", tmp_path / "run"
    # What a save is at after step 0 counts as step 1.
    fault = killed_at(point, step + 1 if point in ("saving", "saved") else step)
    fill(log, range(6))
    with pytest.raises(KilledError):
        learn(model, log, out, fault=fault)
    fill(log, range(NUM_EVENTS))  # the first six again: the log has them
    assert_same(*learn(model, log, out), out, undisturbed)


@pytest.mark.parametrize("point", [pytest.param("updated", marks=pytest.mark.slow), "saved"])
def test_sigkill_in_the_middle(model, tmp_path, undisturbed, point):
    """The signal that nothing can catch, in a process of its own, between update and cursor."""
    log, out = tmp_path / "log.jsonl", tmp_path / "run"
    fill(log, range(NUM_EVENTS))
    command = [sys.executable, tiny_feedback.__file__, *map(str, (model, log, out)), point, "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert_same(*learn(model, log, out), out, undisturbed)


def test_events_that_come_later_are_learnt_later(model, tmp_path, undisturbed):
    log, out = tmp_path / "log.jsonl", tmp_path / "run"
    for count in (1, 2, 3, 5, NUM_EVENTS):
        fill(log, range(count))
        trainer, state = learn(model, log, out)
        assert state.next_event == count // 2 * 2
    assert_same(trainer, state, out, undisturbed)


def test_feedback_by_http_is_learnt_while_it_arrives(model, tmp_path, undisturbed):
    """Clients post, one of them everything twice, and the learner waits for its batches all the while."""
    from actors.feedback_endpoint import FeedbackEndpoint

    log, out, ended = tmp_path / "log.jsonl", tmp_path / "run", []
    writer = FeedbackLog(log)
    learner = threading.Thread(target=lambda: ended.append(learn(model, log, out, num_steps=3)))
    learner.start()
    with closing(FeedbackEndpoint(writer, check=make_pairs(model).check)) as endpoint:
        for number in range(NUM_EVENTS):
            for _ in range(2):
                body = json.dumps(asdict(event(number))).encode()
                request = urllib.request.Request(
                    f"http://127.0.0.1:{endpoint.port}/feedback", body, {"Content-Type": "application/json"}
                )
                with urllib.request.urlopen(request, timeout=60) as answer:
                    assert answer.status == 202
        learner.join(60)
    (pair,) = ended
    assert_same(*pair, out, undisturbed)


def test_a_log_without_what_was_learnt_is_refused(model, tmp_path):
    log, out = tmp_path / "log.jsonl", tmp_path / "run"
    fill(log, range(4))
    learn(model, log, out)
    log.unlink()
    fill(log, [9, 8, 7, 6, 5])
    with pytest.raises(ValueError, match="got another event at place 3 than the one that was learnt from"):
        learn(model, log, out)


def test_pairs_of_a_choice(model):
    pairs, tokenizer = make_pairs(model), load_tokenizer(str(model))
    choice = event(0, shown=["5", "6", "7"], chosen="6")
    made = pairs.pairs(choice)
    assert [pair.id for pair in made] == ["e0:0", "e0:2"]
    assert [decode(tokenizer, pair.rejected_ids) for pair in made] == ["Film 5", "Film 7"]
    assert {decode(tokenizer, pair.chosen_ids) for pair in made} == {"Film 6"}
    assert all(pair.chosen_ids[-1] == tokenizer.eos_token_id for pair in made)
    assert prompt_of(["Film 3", "Film 4"]) in decode(tokenizer, made[0].prompt_ids)
    told = pairs.pairs(event(0, user="nobody", liked=["11"]))
    assert prompt_of(["Film 11"]) in decode(tokenizer, told[0].prompt_ids)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"user": "nobody"}, "user: got one that is not known"),
        ({"user": "new"}, "liked: got nothing"),
        ({"liked": []}, "liked: got nothing"),
        ({"liked": ["77"]}, "liked: got an item that is not known"),
        ({"shown": ["1", "77"], "chosen": "1"}, "shown: got an item that is not known"),
    ],
)
def test_choices_that_make_no_pair_are_refused(model, changes, fault):
    with pytest.raises(ValueError, match=fault):
        make_pairs(model).check(event(0, **changes))


def test_two_items_of_one_title_are_refused(model):
    """By its number and by its title a film is one: its pair would have the same text twice."""
    pairs = make_pairs(model)
    pairs.title = lambda item: f"Film {item.removeprefix('Film ')}"
    with pytest.raises(ValueError, match="shown: got two items of the same title, expected different ones"):
        pairs.check(event(0, shown=["5", "6", "Film 5"], chosen="6"))

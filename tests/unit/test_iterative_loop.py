"""The loop in rounds with real actors of a tiny model: what it tells, and how it goes on after a stop anywhere."""

from __future__ import annotations

import os

import pytest
import torch
from tiny_rounds import RoundRun, write_letter_prompts
from tiny_runs import untimed

from alignment.loops.iterative import RankedRound, RoundLog
from alignment.loops.ranking import AnsweredBatch
from alignment.loops.run import Run
from alignment.run_directory import RunDirectory

FULL = {"batch_size": 4, "optimizer": {"lr": 2e-3}}


class Stop(Exception):
    """Stands for a kill at this place."""


@pytest.fixture(autouse=True)
def _same_umask_afterwards():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_letter_prompts(tmp_path_factory.mktemp("letters") / "prompts.jsonl")


def run_through(run: RoundRun) -> RoundRun:
    with run.stack:
        assert run.train()
    return run


@pytest.fixture(scope="module")
def whole(tiny, prompts, tmp_path_factory):
    """A run that nothing disturbed."""
    return run_through(RoundRun(tiny, prompts, tmp_path_factory.mktemp("whole") / "run"))


def stop_after(monkeypatch, owner, name, count):
    """Let method `name` raise once it has done its work for the `count`-th time."""
    own, left = getattr(owner, name), [count]

    def stopped(*args, **kwargs):
        found = own(*args, **kwargs)
        left[0] -= 1
        if not left[0]:
            raise Stop
        return found

    monkeypatch.setattr(owner, name, stopped)


@pytest.mark.parametrize(
    ("owner", "name", "count"),
    [
        pytest.param(RoundLog, "add", 2, id="while the first round is answered", marks=pytest.mark.slow),
        pytest.param(RoundLog, "add", 4, id="while the second round is answered"),
        pytest.param(RoundLog, "ranked", 2, id="between pairs and steps", marks=pytest.mark.slow),
        pytest.param(Run, "finish_step", 4, id="in a step of the second round"),
        pytest.param(Run, "checkpoint", 5, id="within the last round", marks=pytest.mark.slow),
    ],
)
def test_stopped_anywhere_it_ends_with_the_same_bits(tiny, prompts, whole, tmp_path, monkeypatch, owner, name, count):
    cut = RoundRun(tiny, prompts, tmp_path / "run")
    with monkeypatch.context() as patched, cut.stack:
        stop_after(patched, owner, name, count)
        with pytest.raises(Stop):
            cut.train()
    again = RoundRun(tiny, prompts, tmp_path / "run")
    again.resume()
    run_through(again)
    expected = whole.weights()
    assert all(torch.equal(p, expected[key]) for key, p in again.weights().items())
    assert untimed(again) == untimed(whole)
    for log in ("batches.txt", "pairs.txt"):
        assert (again.folder / log).read_bytes() == (whole.folder / log).read_bytes()


def test_what_a_round_tells(whole):
    rows = whole.metrics()
    assert [row["step"] for row in rows] == list(range(6))
    assert [row["step"] for row in rows if "round/number" in row] == [0, 2, 4]
    assert {"round/score", "round/share_of_prompts_with_a_pair", "round/chosen_tokens"} <= set(rows[0])
    assert rows[0]["reward/letters/mean"] == rows[0]["round/score"]
    assert "held_out/kl" in rows[3], "after two rounds the held-out prompts are answered"
    # At the first step of a round policy and reference are one, and not at the next.
    for row in rows:
        assert (row["dpo/margin"] == 0) == (row["step"] % 2 == 0)


@pytest.mark.slow
def test_a_reference_that_stays_is_left_behind(tiny, prompts, tmp_path):
    sections = {"reference": {"follow": "never"}, "training": FULL}
    rows = run_through(RoundRun(tiny, prompts, tmp_path / "run", **sections)).metrics()
    assert [row["step"] for row in rows if row["dpo/margin"] == 0] == [0]


def test_a_round_without_pairs_is_left_out_and_a_second_one_ends_the_run(tiny, tmp_path, capsys):
    never = write_letter_prompts(tmp_path / "never.jsonl", pattern="no answer has this")
    run = RoundRun(tiny, never, tmp_path / "run")
    with run.stack, pytest.raises(RuntimeError, match="got no pair in 2 rounds in a row, expected answers with diff"):
        run.train()
    assert "round 0: no pair, so its 2 steps are left out" in capsys.readouterr().out
    assert run.run.store.complete() == [2]
    assert [row["step"] for row in run.metrics()] == [0, 2]


def test_a_person_who_tells_no_pair_is_told_what_helps(tiny, prompts, tmp_path):
    sections = {
        "rounds": {"prompts_per_round": 3, "steps_per_round": 2, "label_by": "person", "labels": "l.jsonl"},
        "ranking": {"num_samples_per_prompt": 2, "batch_size": 3, "num_to_label": 2},
    }
    run = RoundRun(tiny, prompts, tmp_path / "run", **sections)
    run.judge = lambda number, answered: RankedRound(rows=[], figures={"prompts": 3, "parts": {}})
    said = "in a row, expected pairs of which somebody can tell the better answer; .* raise ranking.num_to_label or"
    with run.stack, pytest.raises(RuntimeError, match=said):
        run.train()


def test_answers_of_a_round_that_is_over_are_not_made_up(tmp_path):
    with pytest.raises(RuntimeError, match="round 0: got 3 of 3 batches of answers damaged or gone"):
        RoundLog(RunDirectory(tmp_path / "run"), batches_per_round=3, current=1)


@pytest.mark.parametrize(
    ("damaged", "current", "lost"),
    [
        pytest.param(1, 2, "round 0: got 1 of 2", id="a round that is over"),
        pytest.param(3, 1, "round 1: got 1 of 2", id="one whose pairs are known"),
        pytest.param(4, 2, None, id="one that is being answered"),
    ],
)
def test_answers_never_get_the_places_of_earlier_ones(tmp_path, damaged, current, lost):
    """Five batches of rounds of two, with the pairs of rounds 0 and 1; one line is damaged."""
    directory = RunDirectory(tmp_path / "run")
    log = RoundLog(directory, batches_per_round=2, current=0)
    for number in range(3):
        for _ in range(2 if number < 2 else 1):
            log.add(AnsweredBatch(answers=[]))
        if number < 2:
            log.ranked(number, lambda number, answered: RankedRound(rows=[], figures={}))
    lines = directory.batches.read_bytes().splitlines(keepends=True)
    lines[damaged] = b"0" + lines[damaged]
    directory.batches.write_bytes(b"".join(lines))
    if lost is None:
        assert RoundLog(directory, batches_per_round=2, current=current).missing(2) == range(2)
    else:
        with pytest.raises(RuntimeError, match=lost):
            RoundLog(directory, batches_per_round=2, current=current)

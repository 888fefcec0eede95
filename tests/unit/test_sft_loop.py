"""The supervised loop with a real learner: when it validates, stops, keeps and goes on."""

from __future__ import annotations

import io
import os

import pytest
import torch
from tiny_runs import cut_and_resumed
from tiny_sft import Few, Supervised, examples_of

from alignment.loops.offline import SftState, loss_report, take_best, validation
from alignment.metrics import ProgressLine


@pytest.fixture(autouse=True)
def _same_umask_afterwards():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def overfitting(tiny, tmp_path):
    """Four examples are learnt by heart, at the cost of all others."""
    data = Few(examples_of(4, seed=1), examples_of(12, seed=2))
    optimizer = {"lr": 3e-3, "decay": "constant", "warmup_ratio": 0.0}
    made = Supervised(
        tiny / "policy", tmp_path / "run", data, run={"num_steps": 40}, validate_every=2, optimizer=optimizer
    )
    with made.stack:
        yield made


def test_validation_is_per_token_and_its_interval_resamples_examples():
    examples = examples_of(3)
    counts = [e.num_trained for e in examples]
    before, after = [2.0 * n for n in counts], [1.5 * n for n in counts]
    assert validation(before, examples)["validation/loss"] == pytest.approx(2.0)
    assert validation(before, examples)["validation/perplexity"] == pytest.approx(7.389056)
    row = loss_report(before, after, examples, seed=0)
    assert (row["before"], row["after"]) == (pytest.approx(2.0), pytest.approx(1.5))
    low, high = row["gain_ci95"]
    assert low < -0.5 < high
    assert not row["higher_is_better"]


def test_patience_counts_validations_without_a_better_one():
    state = SftState()
    for step, loss in enumerate([3.0, 2.0, 2.5, 1.9, 1.9, 2.0], start=1):
        state.step = step
        state.judge(loss)
    assert (state.best_loss, state.best_step, state.worse_in_a_row) == (1.9, 4, 2)


def test_a_run_that_gets_worse_ends_early_and_keeps_its_best_step(overfitting):
    overfitting.train(patience=2)
    state, rows = overfitting.state, overfitting.metrics()
    losses = {row["step"] + 1: row["validation/loss"] for row in rows if "validation/loss" in row}
    assert state.best_step == min(losses, key=losses.get)
    assert len(rows) == state.step == state.best_step + 4 < 40
    assert rows[-1]["sft/loss"] < rows[0]["sft/loss"]
    # One checkpoint is kept, and the best one beside it.
    assert overfitting.run.store.complete() == sorted({state.best_step, state.step})
    last = overfitting.weights()
    take_best(overfitting.role, overfitting.run, state)
    assert any(not torch.equal(p, last[name]) for name, p in overfitting.weights().items())
    sums = overfitting.role.nll(overfitting.data.held_out).result()
    assert validation(sums, overfitting.data.held_out)["validation/loss"] == state.best_loss


def test_a_damaged_best_step_is_named_and_the_last_one_taken(overfitting):
    overfitting.train(patience=2)
    said = io.StringIO()
    overfitting.run.progress = ProgressLine(said)
    state, last = overfitting.state, overfitting.weights()
    assert state.best_step < state.step
    weights = overfitting.run.store.step_folder(state.best_step) / "policy" / "model.safetensors"
    with open(weights, "r+b") as file:
        file.seek(2000)
        file.write(b"\0" * 2000)
    assert take_best(overfitting.role, overfitting.run, state) == state.step
    assert all(torch.equal(p, last[name]) for name, p in overfitting.weights().items())
    assert "model.safetensors does not match its sha256" in said.getvalue()


def test_the_last_step_is_validated_whatever_the_interval(tiny, tmp_path):
    made = Supervised(
        tiny / "policy",
        tmp_path / "run",
        Few(examples_of(4, seed=1), examples_of(4, seed=2)),
        run={"num_steps": 5},
        validate_every=3,
    )
    with made.stack:
        made.train()
    assert [row["step"] for row in made.metrics() if "validation/loss" in row] == [2, 4]


def test_a_run_that_was_cut_goes_on_to_the_same_end(tiny, tmp_path):
    """Also the count of validations that were not better, and which step is the best."""
    data = Few(examples_of(4, seed=1), examples_of(12, seed=2))
    settings = {"run": {"num_steps": 12}, "validate_every": 3, "optimizer": {"lr": 3e-3}, "neftune_alpha": 1.0}
    whole = Supervised(tiny / "policy", tmp_path / "whole", data, **settings)
    cut = Supervised(tiny / "policy", tmp_path / "cut", data, **settings)
    again = Supervised(tiny / "policy", tmp_path / "cut", data, **settings)
    cut_and_resumed(whole, cut, again, at=6)


def test_the_same_step_twice_trains_once(tiny, tmp_path):
    data = Few(examples_of(4), examples_of(4, seed=2))
    run = Supervised(tiny / "policy", tmp_path / "run", data)
    with run.stack:
        first = run.role.update(data.batch(0, 4), step=0).result()
        after = run.weights()
        assert run.role.update(data.batch(0, 4), step=0).result() == first
        assert all(torch.equal(p, after[name]) for name, p in run.weights().items())

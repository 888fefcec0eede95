"""The loop on pairs and labels with real learners: what it validates, how its reference moves, how it goes on."""

from __future__ import annotations

import math
import os

import pytest
import torch
from tiny_preference_runs import PreferenceRun, label_tasks, pair_tasks
from tiny_runs import cut_and_resumed, untimed

from alignment.reference_cache import cached_numbers

LORA = {"adapter": {"r": 4}, "optimizer": {"lr": 1e-2}}
FULL = {"optimizer": {"lr": 1e-3}}
RARELY = {"num_steps": 4, "checkpoint_every": 4}


@pytest.fixture(autouse=True)
def _same_umask_afterwards():
    before = os.umask(0o022)
    yield
    os.umask(before)


CASES = {
    "DPO, LoRA": (pair_tasks, {"training": LORA}),
    "DPO, LoRA, reference follows": (pair_tasks, {"training": LORA, "reference": {"sync_every": 3}}),
    "DPO, full, reference follows a third": (
        pair_tasks,
        {"training": FULL, "reference": {"sync_every": 3, "sync_share": 0.3}},
    ),
    "SimPO": (
        pair_tasks,
        {"training": FULL, "reference": {"mode": "none"}, "dpo": {"terms": [{"kind": "simpo"}], "beta": 2.0}},
    ),
    "KTO, full": (label_tasks, {"training": FULL}),
    "BCO, LoRA": (label_tasks, {"training": LORA, "kto": {"loss": "bco"}}),
}


QUICK = ("DPO, LoRA, reference follows", "KTO, full")


@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_a_run_that_was_cut_goes_on_to_the_same_end(tiny, tmp_path, case):
    """Bit for bit: weights, metrics, and the reference that the cut run had."""
    tasks, sections = CASES[case]
    training = {**sections["training"], "validate_every": 2}
    settings = {**sections, "run": {"num_steps": 6, "checkpoint_every": 2}, "training": training}
    runs = [
        PreferenceRun(tiny / "policy", tmp_path / folder, tasks(), **settings) for folder in ("whole", "cut", "cut")
    ]
    rows = cut_and_resumed(*runs, at=4)
    assert rows[5]["validation/loss"] < rows[1]["validation/loss"]


@pytest.mark.parametrize(
    ("tasks", "training"),
    [
        pytest.param(pair_tasks, LORA, id="pairs, LoRA"),
        pytest.param(pair_tasks, FULL, marks=pytest.mark.slow, id="pairs, full"),
        pytest.param(label_tasks, LORA, marks=pytest.mark.slow, id="labels, LoRA"),
        pytest.param(label_tasks, FULL, id="labels, full"),
    ],
)
def test_numbers_computed_before_the_run_train_as_live_ones(tiny, tmp_path, tasks, training):
    live = PreferenceRun(tiny / "policy", tmp_path / "live", tasks(), run=RARELY, training=training)
    cached = PreferenceRun(tiny / "policy", tmp_path / "cached", tasks(), run=RARELY, training=training)
    with live.stack, cached.stack:
        live.train()
        data, stage = cached.data, cached.stage
        asked = [data.held_out, *(data.batch(step, 4) for step in range(4))]
        records = [record for batch in asked for part in stage.parts(batch) for record in part]
        numbers, _ = cached_numbers(tmp_path / "cache", {"model": "tiny"}, records, cached.ask)
        cached.role.release_reference().result()
        cached.train(reference=numbers)
        for record in data.train:
            ours, theirs = (torch.tensor(ask([record])) for ask in (numbers, live.ask))
            torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-6)
        for ours, theirs in zip(untimed(cached), untimed(live), strict=True):
            if ours["step"] == 0:  # every gap is 0, and rounding decides on which side of it
                ours.pop("dpo/accuracy", None)
                theirs.pop("dpo/accuracy", None)
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


def test_the_first_loss_is_ln_2_again_after_the_reference_has_followed(tiny, tmp_path):
    run = PreferenceRun(
        tiny / "policy",
        tmp_path / "run",
        pair_tasks(),
        run={"num_steps": 5, "checkpoint_every": 5},
        training={**LORA, "validate_every": 1},
        reference={"sync_every": 3},
    )
    with run.stack:
        run.train()
    losses = [row["dpo/loss"] for row in run.metrics()]
    assert [abs(loss - math.log(2)) < 1e-6 for loss in losses] == [True, False, False, True, False]
    # Validations go by the first reference, and so on falling.
    checked = [row["validation/loss"] for row in run.metrics()]
    assert checked[3] < checked[2] < checked[0] < math.log(2)


def test_several_tasks_are_told_apart_while_they_are_validated(tiny, tmp_path):
    """Records of tiny runs come from s0 and s1 in turn."""
    for name, tasks, figure in (("dpo", pair_tasks(), "accuracy"), ("kto", label_tasks(), "auc")):
        run = PreferenceRun(
            tiny / "policy", tmp_path / name, tasks, run={"num_steps": 2}, training={**LORA, "validate_every": 2}
        )
        with run.stack:
            run.train()
        last = run.metrics()[-1]
        assert {f"validation/{figure}", f"validation/{figure}/s0", f"validation/{figure}/s1"} <= set(last)


def test_the_same_step_twice_moves_the_reference_once(tiny, tmp_path):
    settings = {"training": FULL, "reference": {"sync_every": 1, "sync_share": 0.5}}
    run = PreferenceRun(tiny / "policy", tmp_path / "run", pair_tasks(), **settings)
    with run.stack:
        pairs = run.data.train[:4]
        start = torch.tensor(run.ask(pairs))
        run.role.update(pairs, start.tolist(), step=0).result()
        run.role.follow(step=1).result()
        moved = run.ask(pairs)
        run.role.follow(step=1).result()
        assert run.ask(pairs) == moved
        assert (torch.tensor(moved) - start).abs().max() > 1e-3

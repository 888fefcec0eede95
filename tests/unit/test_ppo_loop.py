"""The loop with all five roles in this process: what must stop a run stops it in time."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch
from tiny_loop import Loop, config_of

from alignment.loops.ppo import PpoState, train_ppo, train_ppo_one_pass


@pytest.fixture(autouse=True)
def _same_umask_afterwards():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.parametrize("train", [train_ppo, train_ppo_one_pass])
@pytest.mark.parametrize(
    ("noise", "limit", "stops"),
    [(0.0, 5.0, False), (0.3, 5.0, True), (0.3, None, False), (math.nan, 5.0, True)],
    ids=["near", "far", "far, no limit", "not a number"],
)
def test_a_step_beyond_the_kl_limit_is_logged_but_never_committed(tiny, tmp_path, train, noise, limit, stops):
    loop = Loop(tiny, tmp_path / "run", train, limit=limit)
    loop.up_to(1)
    loop.move_reference(noise)
    if stops:
        with pytest.raises(RuntimeError, match=r"step 1: got a KL of .*expected at most kl\.limit=5"):
            loop.up_to(2)
    else:
        loop.up_to(2)
    assert loop.run.store.complete() == ([1] if stops else [1, 2])
    rows = loop.metrics()
    assert [row["step"] for row in rows] == [0, 1]
    kl = rows[1]["kl/per_sequence"]
    assert kl is None if math.isnan(noise) else (kl > 5) == (noise > 0)  # JSON has no NaN


@pytest.mark.parametrize("train", [train_ppo, train_ppo_one_pass])
def test_the_gap_between_sampler_and_trainer_is_logged_under_one_name(tiny, tmp_path, train):
    loop = Loop(tiny, tmp_path / "run", train, limit=None)
    loop.up_to(1)
    (row,) = loop.metrics()
    assert [name for name in row if name.endswith("/logprob_gap")] == ["rollout/logprob_gap"]
    assert 0 < row["rollout/logprob_gap"] < 1e-5  # two ways to compute the same numbers in float32


def unchanged(before, after) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("train", [train_ppo, train_ppo_one_pass])
def test_a_sampler_at_another_temperature_stops_a_later_step_before_its_update(tiny, tmp_path, train):
    loop = Loop(tiny, tmp_path / "run", train)
    loop.up_to(1)
    before = {role: loop.weights(role) for role in ("policy", "critic")}
    loop.sample_at(1.5)
    with pytest.raises(RuntimeError, match=r"step 1: got a mean gap of .*logprob_gap_limit=0\.005.*temperature"):
        loop.up_to(2)
    assert unchanged(before["policy"], loop.weights("policy"))
    assert loop.actors["policy"].learner.engine.num_updates == 1
    # In one pass the critic's step comes first, in memory alone.
    assert unchanged(before["critic"], loop.weights("critic")) == (train is train_ppo)
    assert loop.actors["rollout"].engine.weight_version == 1
    assert loop.run.store.complete() == [1]
    assert [row["step"] for row in loop.metrics()] == [0]


@pytest.mark.parametrize("train", [train_ppo, train_ppo_one_pass])
def test_a_sampler_at_another_temperature_never_starts(tiny, tmp_path, train, capsys):
    loop = Loop(tiny, tmp_path / "run", train)
    before = {role: loop.weights(role) for role in ("policy", "critic")}
    loop.sample_at(1.5)
    with pytest.raises(RuntimeError, match=r"invariants: got \['rollout - trainer log-probability gap'\] broken"):
        loop.up_to(1)
    assert all(unchanged(weights, loop.weights(role)) for role, weights in before.items())
    assert loop.run.store.complete() == []
    printed = "".join(capsys.readouterr())
    assert "FAIL  rollout - trainer log-probability gap" in printed
    assert "look at: another temperature in the engine" in printed


@pytest.mark.parametrize("train", [train_ppo, train_ppo_one_pass])
@pytest.mark.parametrize("kind", ["token_tis", "sequence_tis", "icepop"])
def test_a_limit_that_lets_a_disagreeing_sampler_through_leaves_it_to_the_weights(tiny, tmp_path, train, kind):
    loop = Loop(
        tiny, tmp_path / "run", train, logprob_gap_limit=5.0, correction={"kind": kind, "cap": 1.1, "low": 0.9}
    )
    loop.up_to(1)
    loop.sample_at(1.5)
    loop.up_to(2)
    agreeing, disagreeing = loop.metrics()
    changed = f"ppo/correction_{'masked' if kind == 'icepop' else 'truncated'}_fraction"
    for name in ("rollout/ratio_mean", "rollout/effective_sample_size", "ppo/correction_weight_mean"):
        assert agreeing[name] == pytest.approx(1, abs=1e-4)
    assert agreeing[changed] == 0
    assert disagreeing["rollout/logprob_gap"] > 0.05
    assert disagreeing["rollout/effective_sample_size"] < 0.99
    assert disagreeing[changed] > 0
    assert disagreeing["ppo/correction_weight_mean"] != pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("train", [train_ppo, train_ppo_one_pass])
def test_a_sync_that_was_skipped_stops_the_next_step(tiny, tmp_path, train, monkeypatch):
    loop = Loop(tiny, tmp_path / "run", train)
    nothing = loop.roles.rollout.group.call("rollout", "num_receivers")
    monkeypatch.setattr(loop.roles.policy, "send_weights", lambda *_, **__: nothing)
    with pytest.raises(RuntimeError, match=r"got answers sampled by weight versions \[0\], expected 1 alone"):
        loop.up_to(2)
    assert loop.run.store.complete() == [1]


@pytest.mark.parametrize("train", [train_ppo, train_ppo_one_pass])
def test_statistics_of_a_part_are_saved_and_taken_up_again(tiny, tmp_path, train):
    """The third step of a run that was taken up after its second is that of the run that was not, to the last bit."""
    rules = {"functions": [{"name": "text:no_repetition", "normalize": True}], "execution": {"samples_per_call": 3}}
    whole = Loop(tiny, tmp_path / "whole", train, reward=rules)
    whole.up_to(3)
    assert whole.state.parts["text:no_repetition"].count == 12
    again = Loop(tiny, tmp_path / "again", train, reward=rules)
    again.up_to(2)
    saved = json.loads((again.directory.checkpoints / "step_000002" / "loop.json").read_text())
    assert saved["parts"]["text:no_repetition"]["count"] == 8
    again.state = PpoState.start(config_of(tiny, num_steps=1, limit=None, reward=rules))
    again.state.load_state_dict(saved)
    again.up_to(3)
    assert again.state.state_dict() == whole.state.state_dict()
    rows = [{k: v for k, v in row.items() if not k.startswith("timing/")} for row in whole.metrics()]
    assert [{k: v for k, v in row.items() if not k.startswith("timing/")} for row in again.metrics()] == rows
    assert rows[2]["reward/shaped_score"] != pytest.approx(rows[2]["reward/mean"], abs=1e-3)
    assert rows[2]["reward/text:no_repetition/unscored_count"] == 0
    whole.stack.close()
    again.stack.close()


def test_an_answer_without_a_score_is_left_out_within_the_budget_and_stops_the_run_beyond_it(tiny, tmp_path):
    """Where the function gets no answer to compare with, it has no number, and none is made up. The four answers of a
    step are one call."""
    rules = {"functions": [{"name": "exact_match:multiple_choice", "settings": {"answer": ["A", *[None] * 3]}}]}
    loop = Loop(tiny, tmp_path / "over", train_ppo, reward=rules)
    before = loop.weights("policy")
    with pytest.raises(RuntimeError, match=r"got 3 of 4 answers without a score \(3 none; the first: prompt"):
        loop.up_to(1)
    assert unchanged(before, loop.weights("policy"))
    loop.stack.close()
    within = Loop(tiny, tmp_path / "within", train_ppo, reward={**rules, "max_unscorable": 0.75})
    within.up_to(1)
    (row,) = within.metrics()
    assert row["reward/unscorable_count"] == row["reward/unscored/none"] == 3
    assert row["reward/mean"] == row["reward/exact_match:multiple_choice/mean"]
    samples = [json.loads(line) for line in within.directory.rollouts.read_text().splitlines()]
    assert [sample["score"] is None for sample in samples] == [False, True, True, True]
    assert samples[1]["failures"] == {"exact_match:multiple_choice": "none: the function gave no number"}
    assert "failures" not in samples[0]
    within.stack.close()

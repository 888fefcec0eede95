"""N engines on real local Ray: the samples of one, in the order of the prompts, whoever dies meanwhile."""

from __future__ import annotations

import json
import os

import pytest
from many_engines import MIXED, Training, started_engines

from actors import engine_pool
from actors.handles import PolicyHandle
from actors.worker import ActorDiedError
from alignment.config import PpoRunConfig


@pytest.fixture(autouse=True, scope="module")
def _same_umask_afterwards():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture(scope="module")
def started(tiny, tmp_path_factory):
    config = PpoRunConfig.model_validate(
        {
            "run": {"num_steps": 3, "trackers": []},
            "data": {"source": {"path": f"{tiny}/prompts.jsonl"}, "held_out": 4},
            "model": {"path": str(tiny / "policy")},
            "reward": {"model": str(tiny / "reward")},
            # Four sequences to a batch and a step of 16: six shares for three engines.
            "rollout": {"engine": "transformers", "max_new_tokens": 12, "max_batch": 4},
            "ppo": {"rollout_batch_size": 8, "num_samples_per_prompt": 2, "minibatch_size": 8},
            "policy": {"optimizer": {"lr": 1e-2}},
        }
    )
    with started_engines(config, tmp_path_factory.mktemp("faults")) as engines:
        yield engines


@pytest.fixture(scope="module")
def undisturbed(started, tmp_path_factory) -> dict[str, bytes]:
    training = Training(started, tmp_path_factory.mktemp("undisturbed"))
    training.up_to(1)
    result = training.end()
    assert training.metrics("rollout/engine_restarts_count") == [0.0, 0.0, 0.0]
    assert min(training.metrics("rollout/slowest_over_mean")) >= 1
    assert {json.loads(line)["weight_version"] for line in result["run/rollouts.jsonl"].splitlines()} == {0, 1, 2}
    return result


def test_any_number_of_engines_samples_the_same_in_order(started):
    alone = started.engines.only(0).scatter("rollout", "generate", MIXED, step=5, num_samples=3).result()
    assert [(r.prompt.id, r.sample_index) for r in alone] == [(p.id, k) for p in MIXED for k in range(3)]
    assert len({r.response_ids for r in alone}) == len(alone)
    for count in (1, 2, 3):
        got = started.handle(count).generate(MIXED, step=5, num_samples=3).result()
        if count == 1:
            assert got == alone, "one engine is asked the way it always was"
        assert [(r.prompt, r.sample_index, r.response_ids) for r in got] == [
            (r.prompt, r.sample_index, r.response_ids) for r in alone
        ]
        assert [r.finish_reason for r in got] == [r.finish_reason for r in alone]
        for ours, theirs in zip(got, alone, strict=True):
            assert ours.rollout_logprobs == pytest.approx(theirs.rollout_logprobs, abs=1e-5)


def test_fewer_prompts_than_engines_and_settings_that_reach_them(started):
    handle = started.handle()
    (one,) = handle.generate(MIXED[:1], step=2, max_new_tokens=5).result()
    assert len(one.response_ids) == 5
    greedy = handle.generate(MIXED[:2], step=2, num_samples=2, greedy=True).result()
    assert greedy[0].response_ids == greedy[1].response_ids
    assert handle.generate([], step=2).result() == []


@pytest.mark.slow
def test_only_the_share_that_was_sampled_is_sampled_again(started, capfd):
    """Two generations at once, six shares each; an engine gives one share back and dies of its second."""
    handle, calls = started.handle(2), started.faults / "calls"
    expected = [handle.generate(MIXED, step=step, num_samples=2).result() for step in (7, 8)]
    calls.unlink()
    handle.metrics()
    started.plant("die after the next share", 1)
    both = [handle.generate(MIXED, step=step, num_samples=2) for step in (7, 8)]
    assert [pending.result() for pending in both] == expected, "a share is the same batch wherever it is sampled"
    assert len(calls.read_text().splitlines()) == 6 + 6 + 1
    assert handle.metrics()["rollout/engine_restarts_count"] == 1
    assert capfd.readouterr().err.count("rollout: engine 2 of 2 died") == 1
    started.engines.workers[:2] = handle.group.workers


@pytest.mark.slow
def test_a_run_whose_engines_are_killed_ends_as_the_undisturbed_one(started, undisturbed, tmp_path):
    """While one samples from the first weights, while one samples from later ones, in a sync, and between steps."""
    training = Training(started, tmp_path)
    started.plant("die while it samples", 0)
    training.up_to(1)
    started.plant("die while it samples", 1)
    started.plant("die while it receives", 2)
    training.up_to(2)
    started.kill(0)
    assert training.end() == undisturbed
    # More than one step may have.
    assert training.metrics("rollout/engine_restarts_count") == [1.0, 2.0, 1.0]


def test_a_fault_of_any_engine_fails_the_sync(started):
    handle, policy = started.handle(), PolicyHandle(started.groups["policy"])
    started.plant("damage", 2)
    with pytest.raises(RuntimeError, match=r"weight sync of version 4, bucket 0: got bytes with sha256"):
        policy.send_weights(handle, version=4).result()
    (started.faults / f"damage-{started.pid(2)}").unlink()
    assert policy.send_weights(handle, version=5).result() == 5
    versions = [engine.weight_version for engine in handle.generate(MIXED, step=1).result()]
    assert versions == [5] * len(MIXED)


def test_a_broadcast_reaches_every_engine_and_one_that_was_started_again(started):
    """Over gloo. The group is formed once, and anew when a process was replaced."""
    plain, policy = started.handle(), PolicyHandle(started.groups["policy"])
    assert policy.send_weights(plain, version=6).result() == 6
    expected = plain.generate(MIXED, step=4).result()
    handle, policy = started.handle(), PolicyHandle(started.groups["policy"], "broadcast")
    for version in (6, 7):
        assert policy.send_weights(handle, version=version).result() == version
        got = handle.generate(MIXED, step=4).result()
        assert [(r.response_ids, r.weight_version) for r in got] == [(r.response_ids, version) for r in expected]
    started.kill(1)
    assert [r.response_ids for r in handle.generate(MIXED, step=4).result()] == [r.response_ids for r in expected]
    assert policy.send_weights(handle, version=8).result() == 8
    assert {r.weight_version for r in handle.generate(MIXED, step=4).result()} == {8}
    started.engines.workers[:] = handle.group.workers


def test_weights_that_the_policy_no_longer_has_are_not_passed_off_as_such(started, tmp_path):
    handle, policy = started.handle(), PolicyHandle(started.groups["policy"])
    assert policy.send_weights(handle, version=1).result() == 1
    policy.group.call("policy", "save", tmp_path).result()
    policy.load(tmp_path).result()
    started.kill(1)
    with pytest.raises(ActorDiedError, match="no longer holds the weights of version 1"):
        handle.generate(MIXED, step=1).result()
    # The next weights reach the engine that was left without.
    assert policy.send_weights(handle, version=2).result() == 2
    assert {r.weight_version for r in handle.generate(MIXED, step=1).result()} == {2}
    started.engines.workers[:] = handle.group.workers


def test_engines_that_die_again_and_again_end_the_run(started, monkeypatch):
    """With one engine and one restart instead of three, for the sake of time."""
    monkeypatch.setattr(engine_pool, "MAX_RESTARTS", 1)
    handle = started.handle(1)
    (started.faults / "all die").touch()
    with pytest.raises(ActorDiedError, match=r"rollout actor, generate: .*--resume auto"):
        handle.generate(MIXED[:1], step=0).result()
    assert handle.metrics() == {"rollout/engine_restarts_count": 1}

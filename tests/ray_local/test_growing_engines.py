"""Engines that come and go on real local Ray: the samples and weights of one engine, whatever happens on the way."""

from __future__ import annotations

import os

import psutil
import pytest
import ray
from many_engines import MIXED, Started, Training, started_engines
from ray.util.placement_group import placement_group, remove_placement_group

from actors.handles import PolicyHandle, RolloutHandle
from alignment.config import PpoRunConfig

STEPS = 6


@pytest.fixture(autouse=True, scope="module")
def _same_umask_afterwards():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture(scope="module")
def started(tiny, tmp_path_factory):
    config = PpoRunConfig.model_validate(
        {
            "run": {"num_steps": STEPS, "trackers": []},
            "data": {"source": {"path": f"{tiny}/prompts.jsonl"}, "held_out": 4},
            "model": {"path": str(tiny / "policy")},
            "reward": {"model": str(tiny / "reward")},
            # Four sequences to a batch and a step of 16: one engine has four batches to do.
            "rollout": {"engine": "transformers", "max_new_tokens": 12, "max_batch": 4},
            "ppo": {"rollout_batch_size": 8, "num_samples_per_prompt": 2, "minibatch_size": 8},
            "policy": {"optimizer": {"lr": 1e-2}},
        }
    )
    with started_engines(config, tmp_path_factory.mktemp("faults"), num_engines=1) as engines:
        yield engines


def loaded(rollout: RolloutHandle) -> None:
    """Wait for the engine that is on its way."""
    assert rollout.pool is not None
    assert rollout.pool._coming is not None
    ray.wait(rollout.pool._coming.loaded.refs, timeout=120)


def shrink(started: Started, rollout: RolloutHandle) -> None:
    """Two steps with a single share."""
    policy = PolicyHandle(started.groups["policy"])
    for version in (101, 102):
        rollout.generate(MIXED[:2], step=version).result()
        policy.send_weights(rollout, version=version).result()


@pytest.mark.slow
def test_a_run_that_grows_ends_as_one_with_one_engine_and_shrinks_when_idle(started, tmp_path, capfd):
    fixed = Training(started, tmp_path / "fixed", num_steps=STEPS).end()
    training = Training(started, tmp_path / "growing", num_steps=STEPS, engine_limits=(1, 3))
    training.up_to(2)
    loaded(training.roles.rollout)
    training.up_to(4)
    training.up_to(5)
    loaded(training.roles.rollout)
    assert training.end() == fixed
    # The second is asked for after two steps, and joins after the third; the third one after the fifth.
    assert training.metrics("rollout/engines") == [1, 1, 1, 2, 2, 2]
    assert training.metrics("rollout/engine_queue") == [3, 3, 3, 1, 1, 1]
    assert training.metrics("rollout/engine_restarts_count") == [0] * STEPS
    rollout = training.roles.rollout
    assert rollout.pool.num_engines == 3
    assert "rollout: shares were waiting; engine 3 of at most 3 has joined" in capfd.readouterr().err
    processes = [psutil.Process(started.pid(rank)) for rank in range(3)]
    shrink(started, rollout)
    shrink(started, rollout)
    assert [rollout.pool.num_engines, len(started.engines.workers)] == [1, 1]
    psutil.wait_procs(processes[1:], timeout=60)
    assert [process.is_running() for process in processes] == [True, False, False]
    shrink(started, rollout)
    assert rollout.pool.num_engines == 1, "never below the least"


@pytest.mark.slow
def test_a_broadcast_reaches_engines_that_came(started, tmp_path):
    rollout = RolloutHandle(started.groups["rollout"], (1, 2))
    policy = PolicyHandle(started.groups["policy"], "broadcast")
    for version in (201, 202, 203, 204):
        if version == 203:
            loaded(rollout)
        rollouts = rollout.generate(MIXED, step=4).result()
        assert policy.send_weights(rollout, version=version).result() == version
    assert rollout.pool.num_engines == 2
    again = rollout.generate(MIXED, step=4).result()
    assert [r.response_ids for r in again] == [r.response_ids for r in rollouts]
    assert {r.weight_version for r in again} == {204}
    shrink(started, rollout)
    assert rollout.pool.num_engines == 1


@pytest.mark.slow
def test_an_engine_that_dies_as_it_starts_is_contained(started, capfd):
    rollout, policy = RolloutHandle(started.groups["rollout"], (1, 3)), PolicyHandle(started.groups["policy"])
    fault = started.faults / "no second engine"
    fault.touch()
    for version in range(301, 310):
        rollout.generate(MIXED, step=version).result()
        policy.send_weights(rollout, version=version).result()
        if rollout.pool._coming is not None:
            loaded(rollout)
    fault.unlink()
    assert rollout.pool.num_engines == 1
    assert rollout.metrics()["rollout/engine_restarts_count"] == 0
    said = capfd.readouterr().err
    assert said.count("rollout: engine 2 of at most 3 died while it started") == 3
    assert said.count("the run goes on with 1; no other is tried") == 1


@pytest.mark.slow
def test_no_room_is_said_once_and_an_engine_joins_when_there_is(started, capfd):
    free = ray.available_resources()["CPU"]
    other = placement_group([{"CPU": int(free * 10) / 10 - 0.1}])
    assert other.wait(30)
    rollout, policy = RolloutHandle(started.groups["rollout"], (1, 2)), PolicyHandle(started.groups["policy"])
    for version in range(401, 406):
        rollout.generate(MIXED, step=version).result()
        policy.send_weights(rollout, version=version).result()
    assert capfd.readouterr().err.count("rollout: no room for engine 2 of at most 2 yet; the run goes on with 1") == 1
    remove_placement_group(other)
    loaded(rollout)
    rollout.generate(MIXED, step=406).result()
    policy.send_weights(rollout, version=406).result()
    assert rollout.pool.num_engines == 2
    shrink(started, rollout)

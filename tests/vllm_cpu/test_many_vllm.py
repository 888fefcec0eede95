"""N real vLLM engines on local Ray: the samples of one, and the weights of an undisturbed run when some are killed."""

from __future__ import annotations

import json
import os

import pytest
from many_engines import MIXED, NUM_ENGINES, Training, started_engines
from tiny import write_prompts, write_tiny_model, write_tiny_reward_model

from actors.handles import PolicyHandle
from alignment.config import PpoRunConfig

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


@pytest.fixture(autouse=True, scope="module")
def _same_umask_afterwards():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    write_tiny_model(folder / "policy", hidden_size=64, num_attention_heads=2)
    write_tiny_reward_model(folder / "reward")
    write_prompts(folder / "prompts.jsonl")
    config = PpoRunConfig.model_validate(
        {
            "run": {"num_steps": 3, "trackers": []},
            "data": {"source": {"path": f"{folder}/prompts.jsonl"}, "held_out": 4},
            "model": {"path": str(folder / "policy")},
            "reward": {"model": str(folder / "reward")},
            # A share is four batches: 16 sequences are four shares for three engines.
            "rollout": {
                "engine": "vllm",
                "max_new_tokens": 12,
                "max_batch": 1,
                "vllm": {"max_model_len": 256, "kv_cache_gb": 0.1},
            },
            "ppo": {"rollout_batch_size": 8, "num_samples_per_prompt": 2, "minibatch_size": 8},
            "policy": {"optimizer": {"lr": 1e-2}},
        }
    )
    with started_engines(config, tmp_path_factory.mktemp("faults")) as engines:
        yield engines


def samples(rollouts) -> list[tuple]:
    return [(r.prompt.id, r.sample_index, r.response_ids, r.finish_reason, r.weight_version) for r in rollouts]


def test_one_two_and_three_engines_sample_the_same_in_order(started):
    assert PolicyHandle(started.groups["policy"]).send_weights(started.handle(), version=3).result() == 3
    alone = started.engines.only(0).scatter("rollout", "generate", MIXED, step=4, num_samples=2).result()
    assert [(r.prompt.id, r.sample_index) for r in alone] == [(p.id, k) for p in MIXED for k in range(2)]
    assert len({r.response_ids for r in alone}) == len(alone)
    for count in range(1, NUM_ENGINES + 1):
        assert samples(started.handle(count).generate(MIXED, step=4, num_samples=2).result()) == samples(alone)


def trained(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if not name.endswith("rollouts.jsonl")}


def answers(files: dict[str, bytes]) -> list[tuple]:
    (name,) = (name for name in files if name.endswith("rollouts.jsonl"))
    rows = [json.loads(line) for line in files[name].splitlines()]
    return [(row["step"], row["prompt_id"], row["response"], row["weight_version"]) for row in rows]


def test_engines_killed_while_they_sample_do_not_change_the_trained_weights(started, tmp_path):
    undisturbed = Training(started, tmp_path / "undisturbed")
    expected = undisturbed.end()
    assert undisturbed.metrics("rollout/engine_restarts_count") == [0.0, 0.0, 0.0]

    training = Training(started, tmp_path / "disturbed")
    started.plant("die while it samples", 0)
    training.up_to(1)
    started.plant("die while it samples", 1)
    got = training.end()
    assert sum(training.metrics("rollout/engine_restarts_count")) == 2
    assert answers(got) == answers(expected)
    assert trained(got) == trained(expected)

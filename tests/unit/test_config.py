"""What the config classes accept and refuse on their own."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from alignment.config import (
    ClusterConfig,
    Config,
    OptimizerConfig,
    PpoConfig,
    PpoRunConfig,
    RewardConfig,
    RewardFunctionConfig,
    RewardModelRunConfig,
    RolloutConfig,
    SourceConfig,
)

REWARD = RewardConfig(functions=(RewardFunctionConfig(name="text:finished_sentence"),))


def classes(base: type[Config] = Config) -> list[type[Config]]:
    return [found for cls in base.__subclasses__() for found in (cls, *classes(cls))]


@pytest.mark.parametrize("cls", classes(), ids=lambda cls: cls.__name__)
def test_every_field_is_documented(cls):
    undocumented = [name for name, field in cls.model_fields.items() if not (field.description or "").strip()]
    assert not undocumented


@pytest.mark.parametrize("cls", [PpoRunConfig, RewardModelRunConfig, ClusterConfig, PpoConfig])
def test_unknown_keys_are_refused(cls):
    with pytest.raises(ValidationError, match="extra_forbidden"):
        cls.model_validate({"no_such_key": 1})


def test_configs_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        PpoConfig().gamma = 0.5


@pytest.mark.parametrize(
    ("cls", "values"),
    [
        (PpoConfig, {"clip_ratio": 1.0}),
        (PpoConfig, {"clip_ratio": 0.0}),
        (PpoConfig, {"gamma": 1.01}),
        (PpoConfig, {"gae_lambda": float("nan")}),
        (PpoConfig, {"ppo_epochs": 0}),
        (PpoConfig, {"dual_clip": 1.0}),
        (OptimizerConfig, {"lr": float("nan")}),
        (OptimizerConfig, {"lr": float("inf")}),
        (OptimizerConfig, {"lr": 0.0}),
        (OptimizerConfig, {"betas": (0.9,)}),
        (RolloutConfig, {"temperature": 0.0}),
        (RewardConfig, {"model": "m", "max_unscorable": 1.5}),
    ],
)
def test_out_of_range_is_refused(cls, values):
    with pytest.raises(ValidationError) as refusal:
        cls(**values)
    assert refusal.value.errors()[0]["loc"][0] == next(reversed(values))


@pytest.mark.parametrize("values", [{"top_p": 0.9}, {"top_k": 50}])
def test_a_cut_support_is_refused_while_training(values):
    with pytest.raises(ValidationError, match=r"expected 1\.0 and 0"):
        RolloutConfig(**values)


@pytest.mark.parametrize("values", [{}, {"path": "a.jsonl", "hub": "b"}])
def test_a_source_is_exactly_one(values):
    with pytest.raises(ValidationError, match="exactly one of path, hub, asset"):
        SourceConfig(**values)


def test_something_must_score():
    with pytest.raises(ValidationError, match="at least one"):
        RewardConfig()


@pytest.mark.parametrize(("minibatch_size", "fits"), [(16, True), (8, True), (1, True), (7, False), (32, False)])
def test_minibatches_divide_a_step(minibatch_size, fits):
    ppo = PpoConfig(rollout_batch_size=8, num_samples_per_prompt=2, minibatch_size=minibatch_size)
    if fits:
        assert PpoRunConfig(reward=REWARD, ppo=ppo).ppo.minibatch_size == minibatch_size
    else:
        with pytest.raises(ValidationError, match=f"got {minibatch_size}, expected a divisor of the 16 sequences"):
            PpoRunConfig(reward=REWARD, ppo=ppo)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"colocate": (("policy", "judge"),)}, "at most once"),
        ({"colocate": (("policy", "critic"), ("policy", "reference"))}, "at most once"),
        ({"policy": {"num_workers": 2}, "colocate": (("policy", "reference"),)}, "different numbers of workers"),
    ],
)
def test_colocation_that_cannot_be_is_refused(values, reason):
    with pytest.raises(ValidationError, match=reason):
        ClusterConfig.model_validate(values)


def test_configs_load_without_torch():
    code = "import sys, alignment.config, alignment.config_io; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""What must hold before the first update: exact in float32, within what rounding explains in bfloat16."""

import pytest

from alignment.config import PpoRunConfig
from alignment.loops.invariants import check_first_step, table
from alignment.rollout_correction import GAP

CHECK = {"ppo/ratio_mean": 1.0, "ppo/approx_kl": 0.0, "ppo/clip_fraction": 0.0}
METRICS = {"kl/per_token_k3": 0.0, GAP: 0.0}


def config_of(dtype: str) -> PpoRunConfig:
    return PpoRunConfig.model_validate({"model": {"dtype": dtype}, "reward": {"model": "scorer"}})


def broken(dtype: str, **changed: float) -> list[str]:
    config = config_of(dtype)
    check = {**CHECK, **{f"ppo/{name}": value for name, value in changed.items()}}
    return [item.name for item in check_first_step(config, check, METRICS, True) if not item.holds]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_policy_that_agrees_with_itself_holds(dtype):
    assert broken(dtype) == []


def test_rounding_clips_single_tokens_in_bfloat16_alone():
    assert broken("bfloat16", clip_fraction=1.4e-3) == []
    assert broken("float32", clip_fraction=1.4e-3) == ["clip fraction"]
    assert broken("bfloat16", clip_fraction=0.02) == ["clip fraction"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_policy_that_is_not_itself_fails_in_either(dtype):
    assert broken(dtype, ratio_mean=1.1, approx_kl=float("nan")) == [
        "importance ratio - 1",
        "KL of the policy to itself",
    ]
    config = config_of(dtype)
    lines = table(check_first_step(config, CHECK | {"ppo/ratio_mean": 1.1}, METRICS, False))
    assert lines.count("FAIL") == 2
    assert "dropout" in lines
    assert "EOS" in lines

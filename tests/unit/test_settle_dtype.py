"""`model.dtype: auto` becomes a dtype before a run starts, by the machines that it will run on."""

from pathlib import Path

import pytest

from alignment import models
from alignment.config import ClusterConfig, SftRunConfig
from recipes.settling import settle_dtype

ON_GPU = ClusterConfig.model_validate({"policy": {"gpus_per_worker": 1}, "colocate": []})


def dtype_of(asked: str, cluster: ClusterConfig) -> str:
    config = SftRunConfig.model_validate({"model": {"dtype": asked, "path": "somewhere"}})
    settled = settle_dtype(config, cluster)
    assert settled.model.path == "somewhere"
    return settled.model.dtype


@pytest.mark.parametrize(("native", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_without_a_gpu_the_processor_decides(monkeypatch, native, expected):
    monkeypatch.setattr(models, "multiplies_bfloat16", lambda: native)
    assert dtype_of("auto", ClusterConfig()) == expected
    assert dtype_of("auto", ON_GPU) == "bfloat16"
    for asked in ("float32", "bfloat16"):
        assert dtype_of(asked, ClusterConfig()) == asked


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux tells them there")
def test_the_processor_is_asked_for_its_instructions():
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    assert models.multiplies_bfloat16() == bool(flags & {"avx512_bf16", "amx_bf16"})

"""What recipes on pairs and labels are made of: fingerprints of what they read, the name of cached numbers."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import write_tiny_model
from tiny_preference_runs import PreferenceRun, label_tasks, pair_tasks

from alignment.config import ClusterConfig, DpoRunConfig, KtoRunConfig, ModelConfig
from recipes.preference_checks import refuse_unshared
from recipes.preference_tuning import Start, ask_reference
from recipes.settling import settle

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _same_umask_afterwards():
    before = os.umask(0o022)
    yield
    os.umask(before)


def start_of(run: PreferenceRun, model_path: str) -> Start:
    model = run.config.model.model_copy(update={"revision": REVISION})
    evaluation: Any = None
    return Start(
        job=SimpleNamespace(config=run.config.model_copy(update={"model": model})),  # type: ignore[arg-type]
        model_path=model_path,
        num_parameters=1,
        tasks=run.data,
        stage=run.stage,
        hygiene="",
        evaluation=evaluation,
    )


@pytest.mark.parametrize(("tasks", "row"), [(pair_tasks, "pair"), (label_tasks, "answer")])
def test_cached_numbers_are_named_by_the_revision_of_the_model(tiny, tmp_path, monkeypatch, tasks, row):
    monkeypatch.setenv("RAYLIGN_CACHE", str(tmp_path / "cache"))
    run = PreferenceRun(tiny / "policy", tmp_path / "run", tasks(), run={"num_steps": 2}, reference={"mode": "cached"})
    start = start_of(run, "org/model")
    assert start.inputs["model"] == f"org/model@{REVISION}"
    assert set(start.inputs) == {"model", f"{row}s"}
    with run.stack:
        numbers = ask_reference(start, run.role, run.run, start.inputs["model"])
        assert numbers is not None
        found, live = (torch.tensor(ask(run.data.held_out)) for ask in (numbers, run.ask))
        torch.testing.assert_close(found, live, atol=0, rtol=1e-6)
    (path,) = (tmp_path / "cache" / "reference").iterdir()
    made_of = json.loads(path.read_text())["made_of"]
    assert made_of.pop("model") == f"org/model@{REVISION}"
    expected = {"kind": row, "dtype": "float32", "attention": "auto", "batch_layout": "auto"}
    own = {"length_alpha": "1.0"} if row == "pair" else {}
    assert made_of == {**expected, "quantization": "none", "share_prompts": "False", **own}


@pytest.mark.parametrize(("kind", "section"), [(DpoRunConfig, "dpo"), (KtoRunConfig, "kto")])
def test_attention_is_one_that_takes_a_mask_where_prompts_are_shared(kind, section):
    for share, asked, expected in (
        (True, "auto", "sdpa"),
        (False, "auto", "auto"),
        (True, "eager", "eager"),
        (True, "flash_attention_2", "flash_attention_2"),
    ):
        config = kind.model_validate(
            {section: {"share_prompts": share}, "model": {"attention": asked, "dtype": "bfloat16"}}
        )
        assert settle(config, ClusterConfig()).model.attention == expected


def test_models_that_cannot_share_prompts_are_refused_by_their_config(tiny, tmp_path):
    lora = DpoRunConfig().training.adapter
    whole = ModelConfig(path=str(tiny / "policy"))
    refuse_unshared(whole, lora)
    flash = whole.model_copy(update={"attention": "flash_attention_2"})
    with pytest.raises(ValueError, match=r"attention: got flash_attention_2 .*; set model\.attention: sdpa, or share"):
        refuse_unshared(flash, lora)
    with pytest.raises(ValueError, match=r"share_prompts: got true with adapter\.type=prefix"):
        refuse_unshared(whole, lora.model_copy(update={"type": "prefix"}))
    narrow = ModelConfig(path=str(write_tiny_model(tmp_path, "mistral", sliding_window=4)))
    with pytest.raises(ValueError, match="do not all look back to the first token, expected full attention"):
        refuse_unshared(narrow, lora)

"""What runs on pairs and labels refuse before anything is read."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from alignment.config import DpoRunConfig, KtoRunConfig

LORA = {"adapter": {"r": 4}}


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"reference": {"mode": "none"}}, "reference.mode: got none with dpo.terms"),
        ({"dpo": {"terms": [{"kind": "simpo"}]}}, "got live with dpo.terms.*expected none"),
        ({"dpo": {"terms": [{"kind": "sft"}]}}, r"dpo.terms: got \['sft'\], expected one at least that compares"),
        ({"dpo": {"terms": [{}, {}]}}, "expected each once"),
        ({"dpo": {"terms": [{"kind": "orpo", "per_token": True}]}}, "per_token: got it with orpo"),
        ({"dpo": {"terms": [{"kind": "ipo"}], "label_smoothing": 0.1}}, "none of them reads it"),
        ({"dpo": {"margin": 0.5}}, r"dpo.margin: got 0.5 with terms \['sigmoid'\], expected 1: simpo alone"),
        ({"dpo": {"label_smoothing": 0.5}}, "less than 0.5"),
        ({"dpo": {"beta": 0}}, "greater than 0"),
        ({"reference": {"mode": "cached", "sync_every": 4}}, "sync_every: got 4 with reference.mode=cached"),
        ({"reference": {"sync_every": 4, "sync_share": 0.5}, "training": LORA}, "two low-rank updates"),
        (
            {"reference": {"sync_every": 4}, "training": {"adapter": {"type": "adalora", "r": 12}}},
            "its ranks go on moving",
        ),
        ({"training": {"max_tokens_per_micro_batch": 600}}, "at least the 1024 of the longest pair"),
        ({"training": {"patience": 2}}, "patience: got 2 with training.validate_every=0"),
        ({"training": {"validate_every": 2}, "data": {"held_out": 0}}, "expected rows to validate on"),
        ({"data": {"sources": [{"path": "a", "weight": 1}, {"path": "b"}]}}, "for every task or for none"),
        ({"data": {"sources": [{"path": "a", "name": "x"}, {"path": "b", "name": "x"}]}}, "rename one"),
        ({"evaluation": {"source": {"path": "a"}}}, "expected both or neither"),
        ({"model": {"dtype": "float16"}}, "bfloat16"),
    ],
)
def test_of_pairs(sections, reason):
    with pytest.raises(ValidationError, match=reason):
        DpoRunConfig.model_validate(sections)


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"training": {"batch_size": 1}}, "batch_size: got 1, expected 2 or more"),
        ({"reference": {"mode": "none"}}, "got none with labels"),
        ({"kto": {"loss": "dpo"}}, "'kto' or 'bco'"),
        ({"kto": {"desirable_weight": 0}}, "greater than 0"),
        ({"training": {"max_tokens_per_micro_batch": 500}}, "at least the 512 of the longest answer"),
    ],
)
def test_of_labels(sections, reason):
    with pytest.raises(ValidationError, match=reason):
        KtoRunConfig.model_validate(sections)


def test_what_is_allowed_beside_them():
    full = DpoRunConfig.model_validate({"reference": {"sync_every": 4, "sync_share": 0.6}})
    assert full.reference.sync_share == 0.6
    lora = DpoRunConfig.model_validate({"reference": {"sync_every": 4}, "training": LORA})
    assert (lora.reference.sync_every, lora.reference.sync_share) == (4, 1.0)
    alone = {"dpo": {"terms": [{"kind": "cpo"}, {"kind": "sft"}]}, "reference": {"mode": "none"}}
    assert not DpoRunConfig.model_validate(alone).dpo.uses_reference
    simpo = {"dpo": {"terms": [{"kind": "simpo"}], "margin": 0.5}, "reference": {"mode": "none"}}
    assert DpoRunConfig.model_validate(simpo).dpo.margin == 0.5
    one = KtoRunConfig.model_validate({"training": {"batch_size": 1}, "kto": {"loss": "bco"}})
    assert one.training.batch_size == 1
    held_out = {"sources": [{"path": "a", "held_out": {"path": "b"}}], "held_out": 0}
    elsewhere = DpoRunConfig.model_validate({"training": {"validate_every": 2}, "data": held_out})
    assert elsewhere.data.sources[0].held_out.path == "b"

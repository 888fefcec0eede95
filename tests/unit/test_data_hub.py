"""Hub names without a hub: what the cache holds works, what it does not hold is refused within seconds."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import write_tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def python(code: str, *words: str, **env: str) -> subprocess.CompletedProcess:
    """In a process of its own: that the hub is not reachable is remembered by the process."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120, env={**plain, **env}
    )


@pytest.fixture
def silent_hub():
    """The address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def cached(home: Path, name: str, commit: str = COMMIT, *, main: bool = True) -> Path:
    """A tiny model as the hub's client caches it, under `commit` alone unless `main` points at it."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    write_tiny_model(repository / "snapshots" / commit)
    if main:
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
    return repository


RESOLVE = """
import sys, time
from alignment.data.model_assets import resolve_model
began = time.monotonic()
try:
    print(resolve_model(sys.argv[1], sys.argv[2] or None))
except ValueError as error:
    print("refused", error)
print(time.monotonic() - began < 8)
"""


def test_a_silent_hub_is_asked_once_and_the_name_refused(silent_hub, tmp_path):
    done = python(RESOLVE, "owner/name", "", HF_ENDPOINT=silent_hub, HF_HOME=str(tmp_path))
    refusal, in_time = done.stdout.splitlines()
    assert refusal.startswith("refused model 'owner/name': got no folder of that name here and no config.json")
    assert "the hub is not reachable" in refusal
    assert silent_hub in refusal
    assert "expected a model that one of them has; set HF_HUB_OFFLINE=0" in refusal
    assert in_time == "True"


def test_a_cached_name_works_with_a_silent_hub(silent_hub, tmp_path):
    cached(tmp_path, "owner/name")
    load = RESOLVE + (
        "from alignment.data.chat import load_tokenizer\n"
        "from alignment.models import load_causal_lm\n"
        "print(len(load_tokenizer('owner/name')), load_causal_lm('owner/name').model.config.vocab_size)"
    )
    done = python(load, "owner/name", "", HF_ENDPOINT=silent_hub, HF_HOME=str(tmp_path))
    assert done.stdout.splitlines() == ["owner/name", "True", "259 259"], done.stderr
    assert "names come from its cache" in done.stderr


def test_a_revision_is_looked_up_as_such(tmp_path):
    cached(tmp_path, "owner/name", main=False)
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    assert python(RESOLVE, "owner/name", COMMIT, **offline).stdout.splitlines()[0] == "owner/name"
    assert "HF_HUB_OFFLINE is set" in python(RESOLVE, "owner/name", "", **offline).stdout
    assert "at revision other" in python(RESOLVE, "owner/name", "other", **offline).stdout


def test_a_cached_model_without_its_weights_is_refused(tmp_path):
    repository = cached(tmp_path, "owner/name")
    (repository / "snapshots" / COMMIT / "model.safetensors").unlink()
    done = python(RESOLVE, "owner/name", "", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert "without model.safetensors, expected the weights" in done.stdout


ROWS = """
import sys
from alignment.config import SourceConfig
from alignment.data.sources import read_rows
try:
    print(len(list(read_rows(SourceConfig(hub="owner/rows")))))
except ValueError as error:
    print("refused", error)
"""


def test_a_data_set_without_a_hub_is_refused_and_a_cached_one_read(silent_hub, tmp_path):
    began = time.monotonic()
    refusal = python(ROWS, HF_ENDPOINT=silent_hub, HF_HOME=str(tmp_path)).stdout
    # Loading the libraries is most of it; a loaded machine gets three times as long.
    assert time.monotonic() - began < 30
    assert refusal.startswith("refused data.source.hub: got 'owner/rows', split 'train'")
    assert "the hub is not reachable" in refusal
    assert "expected a data set of the hub or its cache; set HF_HUB_OFFLINE=0" in refusal

    (tmp_path / "rows.jsonl").write_text('{"question": "a"}\n{"question": "b"}\n')
    make = "import sys, datasets; datasets.load_dataset('json', data_files=sys.argv[1])"
    assert python(make, str(tmp_path / "rows.jsonl"), HF_HOME=str(tmp_path)).returncode == 0
    (made,) = (tmp_path / "datasets" / "json").iterdir()
    # The name is all that tells a data set of the hub from this one in the cache.
    shutil.move(made, tmp_path / "datasets" / "owner___rows" / "default")
    (table,) = (tmp_path / "datasets" / "owner___rows").rglob("json-train.arrow")
    table.rename(table.with_name("rows-train.arrow"))
    assert python(ROWS, HF_ENDPOINT=silent_hub, HF_HOME=str(tmp_path)).stdout.strip() == "2"

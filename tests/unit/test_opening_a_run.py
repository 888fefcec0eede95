"""What a recipe finds in its output directory: the checkpoint it goes on from, and what it leaves on a refusal."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from alignment.checkpoint import CheckpointStore
from alignment.config import PpoRunConfig
from alignment.run_directory import RunDirectory, append_lines
from recipes.common import once, open_run_directory, parse
from recipes.reward_modelling import HeldOutScores
from recipes.supervised import HeldOut


@pytest.fixture(autouse=True)
def _same_umask_afterwards():
    before = os.umask(0o022)
    yield
    os.umask(before)


def never() -> HeldOut:
    raise AssertionError("made a second time")


def test_a_record_is_made_once_and_comes_back_as_it_was(tmp_path):
    """Also numbers that decimals do not end, and texts beyond ASCII."""
    for number, record in enumerate(
        [HeldOut(sums=[0.1 + 0.2, 1e-17], answers=["头痛\n", ""]), HeldOutScores(scores=[[1 / 3], [-2.5, 7.0], []])]
    ):
        path = tmp_path / f"{number}.json"
        assert once(path, type(record), lambda made=record: made) is record
        assert once(path, type(record), never) == record
        path.write_text(path.read_text().replace("[", "", 1))
        with pytest.raises(ValueError, match=f"{number}.json: got a damaged record"):
            once(path, type(record), never)


def start(output: Path, *flags: str) -> tuple[RunDirectory, Path | None]:
    """As a process that then ends: the directory is free for the next one."""
    job = parse("ppo_medical", PpoRunConfig, ["--output-dir", str(output), *flags])
    directory, found = open_run_directory(job)
    directory.unlock()
    return directory, found


def commit(output: Path, *steps: int) -> list[Path]:
    store = CheckpointStore(output / "checkpoints", keep=len(steps))
    folders = []
    for step in steps:
        (store.begin(step) / "weights").write_bytes(bytes(step))
        folders.append(store.commit(step))
    return folders


def log(directory: RunDirectory, *steps: int) -> None:
    for step in steps:
        append_lines(directory.metrics, [json.dumps({"step": step, "reward/mean": 0.5, "timing/step": 2.0})])
        directory.append_rollouts(step, [{"response": "a"}, {"response": "b"}])


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_named_checkpoint_of_this_run_is_taken(tmp_path):
    start(tmp_path / "run")
    _, second, third = commit(tmp_path / "run", 1, 2, 3)
    assert start(tmp_path / "run")[1] == third
    assert start(tmp_path / "run", "--resume", str(second))[1] == second


@pytest.mark.parametrize("place", ["other/checkpoints", "run/final", "run/checkpoints/older"])
def test_a_named_checkpoint_from_elsewhere_is_refused_and_nothing_is_deleted(tmp_path, place):
    start(tmp_path / "run")
    own = commit(tmp_path / "run", 1, 2, 3)
    foreign = commit(tmp_path / "elsewhere", 1)[0]
    (tmp_path / place).mkdir(parents=True)
    foreign = foreign.rename(tmp_path / place / "step_000001")
    assert CheckpointStore.verify_folder(foreign) is None, "refused for where it is, not for what it is"
    with pytest.raises(ValueError, match=r"got .*step_000001 \(a checkpoint of another run\), expected"):
        start(tmp_path / "run", "--resume", str(foreign))
    assert all(folder.is_dir() for folder in own)


def test_a_checkpoint_of_this_run_may_be_named_by_another_way_to_it(tmp_path, monkeypatch):
    start(tmp_path / "disk" / "run")
    commit(tmp_path / "disk" / "run", 1, 2)
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    monkeypatch.chdir(tmp_path)
    assert start(Path("disk/run"), "--resume", "link/run/checkpoints/step_000002")[1] is not None


def test_a_refused_resume_leaves_no_config_behind(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        start(tmp_path / "run", "--resume", str(tmp_path / "nowhere"))
    assert not (tmp_path / "run" / "config.yaml").exists()
    # A copy, because this process holds the lock until it ends. There is no run in it: any config may start there.
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert start(tmp_path / "copy", "--resume", "never", "--kl.coef", "0.2")[1] is None
    directory, _ = start(tmp_path / "copy", "--kl.coef", "0.2")
    befores = [directory.path / f"{name}_before.json" for name in ("held_out", "answers")]
    for path in befores:
        path.write_text("{}")
    # Nothing was trained: the start may have failed for its config, and another one may have the place.
    assert start(tmp_path / "copy", "--kl.coef", "0.3")[1] is None
    assert not any(path.exists() for path in befores)
    log(directory, 0)
    with pytest.raises(ValueError, match=r"kl\.coef: 0\.3 -> 0\.4"):
        start(tmp_path / "copy", "--kl.coef", "0.4")


def test_lines_of_an_attempt_without_a_checkpoint_are_cut(tmp_path):
    directory, found = start(tmp_path / "run")
    assert found is None
    log(directory, 0, 1, 2)
    assert start(tmp_path / "run")[1] is None
    assert steps_in(directory.metrics) == []
    assert steps_in(directory.rollouts) == []


def test_lines_are_cut_when_every_checkpoint_is_damaged(tmp_path, capsys):
    directory, _ = start(tmp_path / "run")
    for folder in commit(tmp_path / "run", 1, 2):
        (folder / "weights").write_bytes(b"?" * 40)
    log(directory, 0, 1, 2)
    assert start(tmp_path / "run")[1] is None
    assert steps_in(directory.metrics) == []
    assert "step 2 is not used" in capsys.readouterr().err


def test_lines_stay_while_there_is_a_checkpoint_to_go_on_from(tmp_path):
    directory, _ = start(tmp_path / "run")
    log(directory, 0, 1, 2)
    (folder,) = commit(tmp_path / "run", 2)
    assert start(tmp_path / "run")[1] == folder
    assert steps_in(directory.metrics) == [0, 1, 2]

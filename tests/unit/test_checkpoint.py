"""Checkpoints: complete and verified, or passed over with a reason; whatever is killed, cut or flipped."""

import json
import os
import pickle
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alignment import run_directory
from alignment.checkpoint import (
    MANIFEST,
    CheckpointStore,
    load_json,
    load_state,
    save_json,
    save_state,
)

PARTS = ("policy/model.bin", "policy/config.json", "critic/learner.bin", "loop.json")


def content(step: int, name: str) -> bytes:
    return f"{step} {name} ".encode() * 50


def save_step(store: CheckpointStore, step: int) -> Path:
    folder = store.begin(step)
    for name in PARTS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content(step, name))
    return store.commit(step, {"model": "tiny"})


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def test_a_committed_step_is_whole_and_described(store):
    folder = save_step(store, 10)
    assert folder == store.folder / "step_000010"
    assert store.complete() == [10]
    assert store.verify(10) is None
    assert store.verify_folder(folder) is None
    assert store.latest_valid() == (folder, [])
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["step"] == 10
    assert manifest["provenance"] == {"model": "tiny"}
    assert set(manifest["files"]) == set(PARTS)
    assert manifest["files"]["loop.json"]["size"] == len(content(10, "loop.json"))
    assert [p.name for p in store.folder.iterdir()] == ["step_000010"]


def test_sha256_is_the_known_one(store):
    folder = store.begin(1)
    (folder / "abc").write_bytes(b"abc")
    manifest = json.loads((store.commit(1) / MANIFEST).read_text())
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert manifest["files"] == {"abc": {"sha256": known, "size": 3}}


def test_empty_store(store):
    assert store.complete() == []
    assert store.latest_valid() == (None, [])
    assert store.verify(1) == "step_000001 is not a folder"
    with pytest.raises(ValueError, match="got keep=0"):
        CheckpointStore(store.folder, keep=0)


def test_only_the_newest_are_kept(store):
    for step in (2, 9, 10, 11, 1_000_000, 1_000_001):
        save_step(store, step)
    assert store.complete() == [1_000_000, 1_000_001]
    assert sorted(p.name for p in store.folder.iterdir()) == ["step_1000000", "step_1000001"]


def test_a_step_saved_again_replaces_the_old_one(store):
    save_step(store, 1)
    (save_step(store, 2) / "loop.json").write_bytes(b"damaged")
    assert store.latest_valid()[0] == store.step_folder(1)
    save_step(store, 2)
    assert store.latest_valid() == (store.step_folder(2), [])


def test_discard_after_drops_the_abandoned_future(store):
    for step in (1, 2):
        save_step(store, step)
    store.discard_after(1)
    assert sorted(p.name for p in store.folder.iterdir()) == ["step_000001"]


def flip(path: Path, offset: int = 100) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(bytes(data))


def link(folder: Path) -> None:
    (folder / "loop.json").rename(folder.parent.parent / "elsewhere")
    (folder / "loop.json").symlink_to(folder.parent.parent / "elsewhere")


def edit_provenance(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace("tiny", "tinz"))


def claim_another_step(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "step_000001", folder)


def become_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit flip": (lambda f: flip(f / "policy/model.bin"), "policy/model.bin does not match its sha256"),
    "truncated": (
        lambda f: os.truncate(f / "policy/model.bin", 7),
        "policy/model.bin has 7 bytes, the manifest says 950",
    ),
    "emptied": (lambda f: os.truncate(f / "loop.json", 0), "loop.json has 0 bytes, the manifest says 600"),
    "missing file": (lambda f: (f / "critic/learner.bin").unlink(), "critic/learner.bin is missing"),
    "missing folder": (lambda f: shutil.rmtree(f / "critic"), "critic/learner.bin is missing"),
    "extra file": (lambda f: (f / "policy/x.pt").write_text("x"), "policy/x.pt is not in the manifest"),
    "link": (link, "loop.json is a link, expected plain files only"),
    "pipe": (lambda f: os.mkfifo(f / "pipe"), "pipe is not a plain file"),
    "missing manifest": (lambda f: (f / MANIFEST).unlink(), "manifest.json is missing"),
    "empty manifest": (lambda f: os.truncate(f / MANIFEST, 0), "manifest.json is damaged"),
    "cut manifest": (lambda f: os.truncate(f / MANIFEST, 90), "manifest.json is damaged"),
    "binary manifest": (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe\x00"), "manifest.json is damaged"),
    "list manifest": (lambda f: (f / MANIFEST).write_text("[]"), "manifest.json is damaged"),
    "edited manifest": (edit_provenance, "manifest.json does not match its own digest"),
    "another step's": (claim_another_step, "manifest.json is of step 1"),
    "gone": (become_a_file, "step_000002 is not a folder"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_the_step_before_is_taken(store, name):
    for step in (1, 2):
        save_step(store, step)
    damage, reason = DAMAGE[name]
    damage(store.step_folder(2))
    assert store.verify(2) == reason
    assert store.latest_valid() == (store.step_folder(1), [(2, reason)])


def test_every_single_bit_of_a_part_matters(store):
    folder = save_step(store, 1)
    path = folder / "loop.json"
    whole = path.read_bytes()
    for offset in range(0, len(whole), 97):
        flip(path, offset)
        assert store.verify(1) == "loop.json does not match its sha256"
        path.write_bytes(whole)
    assert store.verify(1) is None


def test_all_damaged_means_none_with_all_reasons(store):
    for step in (1, 2):
        save_step(store, step)
    for step in (1, 2):
        (store.step_folder(step) / MANIFEST).unlink()
    assert store.latest_valid() == (None, [(2, "manifest.json is missing"), (1, "manifest.json is missing")])


def test_a_part_that_writes_a_link_is_refused(store, tmp_path):
    folder = store.begin(1)
    (tmp_path / "secret").write_text("x")
    (folder / "model.bin").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"model\.bin is a link"):
        store.commit(1)
    assert store.complete() == []


def in_child(store: CheckpointStore, step: int, kill_at: int | None) -> tuple[int, list[str]]:
    """Save `step` in a forked process that SIGKILLs itself at its `kill_at`-th disk operation.

    Returns the wait status and the operations reached. A fork, since the store is plain file work and an import of
    torch per phase would take minutes.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def dying(name: str, real: Callable) -> Callable:
            def operation(*args, **options):
                nonlocal count
                os.write(writer, f"{name}\n".encode())
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                return real(*args, **options)

            return operation

        try:
            for module, name in [(os, "fsync"), (os, "replace"), (os, "rename"), (os, "unlink"), (os, "rmdir")]:
                setattr(module, name, dying(name, getattr(module, name)))
            Path.write_bytes = dying("write", Path.write_bytes)  # type: ignore[method-assign]
            Path.mkdir = dying("mkdir", Path.mkdir)  # type: ignore[method-assign]
            sys.modules["alignment.checkpoint"].__dict__["_sha256"] = dying(
                "sha256", sys.modules["alignment.checkpoint"].__dict__["_sha256"]
            )
            save_step(store, step)
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        operations = pipe.read().split()
    return os.waitpid(child, 0)[1], operations


@pytest.mark.parametrize("keep", [1, 2])
def test_kill_at_every_disk_operation_of_a_save(tmp_path, keep):
    rehearsal = CheckpointStore(tmp_path / "rehearsal", keep)
    for step in (1, 2):
        save_step(rehearsal, step)
    status, operations = in_child(rehearsal, 3, None)
    assert status == 0
    assert set(operations) == {"mkdir", "write", "sha256", "fsync", "replace", "rename", "unlink", "rmdir"}
    assert rehearsal.latest_valid() == (rehearsal.step_folder(3), [])
    commit = operations.index("rename")

    for kill_at in range(len(operations)):
        store = CheckpointStore(tmp_path / f"killed_{kill_at}", keep)
        for step in (1, 2):
            save_step(store, step)
        status, reached = in_child(store, 3, kill_at)
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert reached == operations[: kill_at + 1]
        found, passed_over = store.latest_valid()
        assert passed_over == []
        assert found in (store.step_folder(2), store.step_folder(3))
        assert found == store.step_folder(3 if kill_at > commit else 2), operations[kill_at]
        assert (found / "loop.json").read_bytes() == content(int(found.name[5:]), "loop.json")
        save_step(store, 4)  # the next save finds its way through what was left, and cleans up
        left = sorted(path.name for path in store.folder.iterdir())
        assert left[-1] == "step_000004"
        assert len(left) == keep
        assert all(name.startswith("step_") for name in left)


@pytest.mark.parametrize("operation", ["fsync", "rename"])
def test_a_full_disk_leaves_the_previous_step(store, monkeypatch, operation):
    save_step(store, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run_directory.os, operation, full)
        with pytest.raises(OSError, match="No space left"):
            save_step(store, 2)
    assert store.latest_valid() == (store.step_folder(1), [])
    save_step(store, 2)
    assert store.latest_valid() == (store.step_folder(2), [])


def test_optimiser_state_comes_back_and_goes_on_bitwise(tmp_path):
    def run(steps: int, stop: int | None) -> torch.Tensor:
        torch.manual_seed(1)
        weight = torch.nn.Parameter(torch.randn(5))
        optimizer = torch.optim.AdamW([weight], lr=0.1)
        for step in range(steps):
            if step == stop:
                save_state(tmp_path / "state.pt", {"optimizer": optimizer.state_dict(), "steps": (step, 0.5, None)})
                optimizer = torch.optim.AdamW([weight], lr=0.7)
                state = load_state(tmp_path / "state.pt")
                assert state["steps"] == (step, 0.5, None)
                optimizer.load_state_dict(state["optimizer"])
            ((weight - step) ** 2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return weight.detach()

    assert torch.equal(run(6, stop=None), run(6, stop=3))


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_objects_are_neither_written_nor_run(tmp_path):
    with pytest.raises(ValueError, match=r"state\['a'\]\[1\]: got a Canary, expected dict, list"):
        save_state(tmp_path / "x.pt", {"a": [1, Canary(tmp_path / "canary")]})
    assert not (tmp_path / "x.pt").exists()
    torch.save({"a": Canary(tmp_path / "canary")}, tmp_path / "evil.pt")
    with pytest.raises(pickle.UnpicklingError):
        load_state(tmp_path / "evil.pt")
    assert not (tmp_path / "canary").exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert (tmp_path / "canary").exists()  # the file would have run code, had it been asked to


def test_json_comes_back_exactly(tmp_path):
    data = {"kl": 0.1 + 0.2, "n": 2**60, "tiny": 5e-324, "nested": {"list": [1, None, True]}, "text": "é\n"}
    save_json(tmp_path / "x.json", data)
    assert load_json(tmp_path / "x.json") == data

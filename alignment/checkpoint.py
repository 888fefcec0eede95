"""Checkpoints that are complete and verified, or not used; and the formats their parts are written in.

A step is written into a `.tmp_` folder and becomes `step_000010` by one rename, after its manifest holds the sha256 of
every file and everything is on the disk. A kill at any moment leaves the previous step as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignment.run_directory import fsync_path, write_text_atomic

MANIFEST = "manifest.json"


class CheckpointStore:
    """The checkpoints of one run. One process at a time may write; the run directory's lock sees to it."""

    def __init__(self, folder: Path, keep: int) -> None:
        """`keep`: how many of the newest complete steps stay."""
        if keep < 1:
            raise ValueError(f"got keep={keep}, expected at least 1; raise run.keep_checkpoints")
        self.folder, self.keep = Path(folder), keep

    def step_folder(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"

    def begin(self, step: int) -> Path:
        """A fresh folder for the parts of `step`; what a killed save left behind is deleted."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in [*self.folder.glob(".tmp_*"), *self.folder.glob(".trash_*")]:
            shutil.rmtree(leftover)
        folder = self._temporary(step)
        folder.mkdir()
        return folder

    def commit(self, step: int, provenance: Mapping[str, Any] | None = None, *, pinned: int | None = None) -> Path:
        """Hash, write the manifest, fsync, rename, drop the oldest. Returns the step's folder.

        Args:
            provenance: what the manifest should say about where the weights came from.
            pinned: a step that stays beside the newest ones.

        Raises:
            ValueError: a part wrote a link or something else that is not a plain file.
        """
        temporary, target = self._temporary(step), self.step_folder(step)
        files = {}
        for name, path in _plain_files(temporary):
            files[name] = {"sha256": _sha256(path), "size": path.stat().st_size}
            fsync_path(path)
        body = {"format": 1, "step": step, "files": files, "provenance": dict(provenance or {})}
        write_text_atomic(temporary / MANIFEST, json.dumps({**body, "digest": _digest(body)}, indent=1))
        for parent, folders, _ in os.walk(temporary):
            for folder in folders:
                fsync_path(Path(parent, folder))
        fsync_path(temporary)
        if target.exists():
            self._delete(target)
        os.rename(temporary, target)
        fsync_path(self.folder)
        self._prune(step, pinned)
        return target

    def complete(self) -> list[int]:
        """Steps that were committed, oldest first; `verify` says whether they still are what was committed."""
        return [step for step in self._steps() if (self.step_folder(step) / MANIFEST).is_file()]

    def verify(self, step: int) -> str | None:
        """Why this step may not be loaded; None when it is exactly what was committed."""
        return self.verify_folder(self.step_folder(step), step)

    @staticmethod
    def verify_folder(folder: Path, step: int | None = None) -> str | None:
        """`verify` for a checkpoint anywhere; `step` as in its manifest unless given."""
        return _why_invalid(folder, step)

    def latest_valid(self) -> tuple[Path | None, list[tuple[int, str]]]:
        """The newest step that verifies, and the newer ones passed over: (step, reason), newest first."""
        passed_over: list[tuple[int, str]] = []
        for step in reversed(self._steps()):
            reason = self.verify(step)
            if reason is None:
                return self.step_folder(step), passed_over
            passed_over.append((step, reason))
        return None, passed_over

    def discard_after(self, step: int) -> None:
        """Delete later steps: a run that goes on from an older one must not fall back onto the abandoned ones."""
        for later in self._steps():
            if later > step:
                self._delete(self.step_folder(later))

    def _temporary(self, step: int) -> Path:
        return self.folder / f".tmp_step_{step:06d}_{os.getpid()}"

    def _steps(self) -> list[int]:
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return sorted(int(name[5:]) for name in names if re.fullmatch(r"step_\d{6,}", name))

    def _prune(self, newest: int, pinned: int | None) -> None:
        kept = {*self.complete()[-self.keep :], pinned}
        for step in self._steps():
            if step < newest and step not in kept:
                self._delete(self.step_folder(step))

    def _delete(self, folder: Path) -> None:
        # Renamed first: a kill while deleting must not leave half a step under a step's name.
        trash = self.folder / f".trash_{folder.name}_{os.getpid()}"
        os.rename(folder, trash)
        if trash.is_symlink():
            trash.unlink()
        else:
            shutil.rmtree(trash)


def save_state(path: Path, state: Any) -> None:
    """Write plain containers of tensors and numbers, such as an optimiser's state.

    Raises:
        ValueError: another kind of object is in it, which `load_state` would refuse.
    """
    _refuse_objects(state, "state")
    torch.save(state, path)


def load_state(path: Path) -> Any:
    """Read what `save_state` wrote, onto the CPU; a file that asks for code to run is refused by torch."""
    # Mapped: of several ranks on a machine, each takes its part of one copy in the page cache.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def save_json(path: Path, data: Any) -> None:
    """Write plain data; numbers come back as they were."""
    write_text_atomic(path, json.dumps(data, indent=1))


def load_json(path: Path) -> Any:
    """Read what `save_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def _refuse_objects(value: Any, where: str) -> None:
    if value is None or type(value) in (bool, int, float, str) or isinstance(value, Tensor):
        return
    if type(value) is dict:
        for key, item in value.items():
            _refuse_objects(key, f"a key of {where}")
            _refuse_objects(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _refuse_objects(item, f"{where}[{index}]")
    else:
        raise ValueError(
            f"{where}: got a {type(value).__name__}, expected dict, list, tuple, text, number, None or tensor; "
            "convert it before saving"
        )


def _why_invalid(folder: Path, step: int | None) -> str | None:
    if folder.is_symlink() or not folder.is_dir():
        return f"{folder.name} is not a folder"
    try:
        manifest = load_json(folder / MANIFEST)
        digest = manifest.pop("digest")
        files = manifest["files"]
        if digest != _digest(manifest):
            return f"{MANIFEST} does not match its own digest"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, AttributeError, TypeError):
        return f"{MANIFEST} is damaged"
    if step is not None and manifest["step"] != step:
        return f"{MANIFEST} is of step {manifest['step']}"
    try:
        present = dict(_plain_files(folder))
    except ValueError as error:
        return str(error)
    present.pop(MANIFEST)
    for name, promised in files.items():
        if name not in present:
            return f"{name} is missing"
        size = present[name].stat().st_size
        if size != promised["size"]:
            return f"{name} has {size} bytes, the manifest says {promised['size']}"
    for name in present:
        if name not in files:
            return f"{name} is not in the manifest"
    # Hashes last: the cheap checks find most damage at once.
    for name, promised in files.items():
        if _sha256(present[name]) != promised["sha256"]:
            return f"{name} does not match its sha256"
    return None


def _plain_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Relative name and path of every file, in a fixed order; links and special files are refused."""
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted([*folders, *names]):
            path = Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            if path.is_symlink():
                raise ValueError(f"{relative} is a link, expected plain files only")
            if name in names:
                if not path.is_file():
                    raise ValueError(f"{relative} is not a plain file")
                yield relative, path


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()

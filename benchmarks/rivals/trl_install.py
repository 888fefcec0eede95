"""Where the rival is imported from: a pinned TRL of its own, without dependencies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def trl_folder(version: str, given: Path | None) -> Path:
    """Folder to import TRL from: the given one, or a cached install of `version` without dependencies.

    Raises:
        ValueError: the given folder holds no trl package.
    """
    if given is not None:
        if not (given / "trl" / "__init__.py").is_file():
            raise ValueError(f"got --trl-path {given}, expected a folder with trl/ in it; leave the option out")
        return given
    from alignment.data.cache import cache_dir, filled_once

    target = cache_dir() / f"trl-{version}"
    with filled_once(target) as folder:
        if folder is not None:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
            subprocess.run([*pip, f"trl=={version}"], check=True, stdout=sys.stderr)
    return target

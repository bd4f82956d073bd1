"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017): where its four files are found, and how they are checked."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from torch import Tensor

from vision.idx import DataError, read_idx

CLASSES = 10
SYSTEM = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts the files
PACKAGE = "dataset-fashion-mnist"
OFFICIAL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"

# SHA-256 of the decompressed files. Debian drops the name and time from the gzip headers; with those put back
# its files have the MD5s of the official ones, so one table checks both.
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


class NotFound(DataError):
    """Fashion-MNIST is neither on this machine nor to be had from the network."""


@dataclass(frozen=True)
class Files:
    """A folder with the four files, where it came from, and whether they must be the published ones."""

    folder: Path
    source: str
    published: bool = True


def find(folder: Path | None = None) -> Files:
    """Finds the four files: in `folder`, else installed, else cached, else from the network into the cache.

    Raises:
        DataError: `folder` does not hold the four files.
        NotFound: there is no copy; the message says why each way failed.
    """
    if folder is not None:
        if missing := _missing(folder):
            rule = f"must hold {', '.join(SHA256)}, each with or without .gz"
            raise DataError(f"{folder}: {rule}; missing: {', '.join(missing)}")
        return Files(folder, str(folder), published=False)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsekern" / "fashion-mnist"
    for place in (SYSTEM, cache):
        if not _missing(place):
            return Files(place, str(place))
    failures = []
    for source, fetch in (("Debian's package", _fetch_debian), ("the official download", _fetch_official)):
        print(f"Fashion-MNIST: trying {source} ...", flush=True)
        try:
            _fill(cache, fetch)
        except (OSError, HTTPException, subprocess.CalledProcessError, DataError) as error:
            failures.append(f"{source}: {_reason(error)}")
        else:
            return Files(cache, f"{source}, kept in {cache}")
    raise NotFound(f"Fashion-MNIST is not on this machine and could not be fetched ({'; '.join(failures)}).")


def read(files: Files, half: str) -> tuple[Tensor, Tensor]:
    """Reads ``"train"`` or ``"t10k"`` (the test half): images uint8 [n, height, width] and labels uint8 [n].

    Raises:
        DataError: a file is corrupt, truncated, not the published one where it must be, or they do not agree.
    """
    images_path, images = _read(files, f"{half}-images-idx3-ubyte", 3)
    labels_path, labels = _read(files, f"{half}-labels-idx1-ubyte", 1)
    if images.numel() == 0:
        raise DataError(f"{images_path}: must hold at least one image, got sizes {list(images.shape)}")
    if len(labels) != len(images):
        raise DataError(
            f"{labels_path}: must hold {len(images)} labels, one per image of {images_path.name}, "
            f"got {len(labels)}"
        )
    if labels.max() >= CLASSES:
        raise DataError(f"{labels_path}: labels must be 0 to {CLASSES - 1}, got {int(labels.max())}")
    return images, labels


def _read(files: Files, name: str, dimensions: int) -> tuple[Path, Tensor]:
    path = _path(files.folder, name)
    return path, read_idx(path, dimensions, SHA256[name] if files.published else None)


def _path(folder: Path, name: str) -> Path:
    zipped = folder / f"{name}.gz"
    return zipped if zipped.exists() else folder / name


def _missing(folder: Path) -> list[str]:
    return [name for name in SHA256 if not _path(folder, name).is_file()]


def _fill(cache: Path, fetch: Callable[[Path], None]) -> None:
    """Fetches into a new folder and renames it once it is checked: the cache is whole or absent."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent, prefix="fetch-") as temporary:
        folder = Path(temporary) / "files"
        folder.mkdir()
        fetch(folder)
        for half in ("train", "t10k"):
            read(Files(folder, ""), half)
        shutil.rmtree(cache, ignore_errors=True)
        folder.rename(cache)


def _fetch_debian(folder: Path) -> None:
    """Downloads and unpacks Debian's package without root; gets package lists if the machine has none."""
    work = folder.parent
    own = [f"-oDir::State::Lists={work}/lists", f"-oDir::Cache={work}/cache", "-oAPT::Sandbox::User=root"]
    try:
        _run(["apt-get", "download", PACKAGE], work)
    except subprocess.CalledProcessError:
        (work / "lists/partial").mkdir(parents=True)
        (work / "cache/archives/partial").mkdir(parents=True)
        _run(["apt-get", *own, "update"], work)
        _run(["apt-get", *own, "download", PACKAGE], work)
    _run(["dpkg", "-x", *map(str, work.glob(f"{PACKAGE}_*.deb")), str(work / "root")], work)
    for name in SHA256:
        shutil.move(_path(work / "root" / SYSTEM.relative_to("/"), name), folder)


def _fetch_official(folder: Path) -> None:
    for name in SHA256:
        with urllib.request.urlopen(f"{OFFICIAL}/{name}.gz", timeout=20) as answer:
            (folder / f"{name}.gz").write_bytes(answer.read())


def _run(command: Sequence[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        last = error.stderr.strip().splitlines()[-1:] or [f"exit status {error.returncode}"]
        return f"{' '.join(error.cmd[:1])}: {last[0]}"
    return str(error)

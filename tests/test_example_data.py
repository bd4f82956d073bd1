"""The vision examples' data: what is read, what is refused, where it is looked for."""

from __future__ import annotations

import gzip
import hashlib
import re
import struct
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from vision import data, fashion_mnist
from vision.idx import DataError, read_idx

TRAIN, TEST = 12, 5


def idx(values: torch.Tensor) -> bytes:
    sizes = struct.pack(f">{values.dim()}I", *values.shape)
    return bytes([0, 0, 8, values.dim()]) + sizes + values.byte().numpy().tobytes()


def contents() -> dict[str, bytes]:
    """A tiny set in the form of Fashion-MNIST: 4 x 3 pixels, labels 0 to 9."""
    generator = torch.Generator().manual_seed(0)
    result = {}
    for half, n in (("train", TRAIN), ("t10k", TEST)):
        result[f"{half}-images-idx3-ubyte"] = idx(torch.randint(256, (n, 4, 3), generator=generator))
        result[f"{half}-labels-idx1-ubyte"] = idx(torch.arange(n) % 10)
    return result


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the tiny set, half of it gzipped."""
    place = tmp_path / "set"
    place.mkdir()
    for name, content in contents().items():
        if name.startswith("train"):
            (place / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (place / name).write_bytes(content)
    return place


def refuses(folder: Path, file: str, *words: str) -> None:
    """Loading `folder` must fail with one line that names the file, what it must be and what it was."""
    with pytest.raises(DataError) as caught:
        data.load("auto", folder)
    message = str(caught.value)
    assert str(folder / file) in message
    assert "\n" not in message
    for word in ("must", "got", *words):
        assert word in message, message


def test_reads_gzipped_and_raw(folder: Path) -> None:
    images = data.load("fashion-mnist", folder)
    assert (len(images.train), len(images.test)) == (TRAIN, TEST)
    assert images.train.images.shape == (TRAIN, 12)
    assert images.train.images.dtype == torch.uint8
    assert images.train.labels.tolist() == [i % 10 for i in range(TRAIN)]
    pixels = contents()["train-images-idx3-ubyte"][16:]
    assert bytes(images.train.images.flatten().tolist()) == pixels


def test_batches_cover_the_split_once_in_order_feature_major(folder: Path) -> None:
    images = data.load("fashion-mnist", folder)
    order = torch.randperm(TRAIN)
    batches = list(images.batches(images.train, 5, order))
    assert [len(y) for _, y in batches] == [5, 5, 2]
    assert all(x.stride() == (1, len(y)) and x.dtype == torch.float32 for x, y in batches)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert torch.equal(y, images.train.labels[order])
    torch.testing.assert_close(x * images.std + images.mean, images.train.images[order].float())
    assert abs(x.mean().item()) < 1e-5
    assert abs(x.std().item() - 1) < 1e-5


@pytest.mark.parametrize("keep", [0, 3, 11, 40])
def test_refuses_truncated_raw_file(folder: Path, keep: int) -> None:
    path = folder / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:keep])
    refuses(folder, path.name)


@pytest.mark.parametrize("keep", [0, 5, 40])
def test_refuses_truncated_gzip(folder: Path, keep: int) -> None:
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:keep])
    refuses(folder, path.name)


@pytest.mark.parametrize("at", [0, 12, 60, -6])
def test_refuses_corrupt_gzip(folder: Path, at: int) -> None:
    path = folder / "train-images-idx3-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[at] ^= 0x55
    path.write_bytes(content)
    refuses(folder, path.name, "corrupt")


def test_refuses_other_magic(folder: Path) -> None:
    path = folder / "t10k-images-idx3-ubyte"
    path.write_bytes((folder / "t10k-labels-idx1-ubyte").read_bytes())
    refuses(folder, path.name, "00 00 08 03", "00 00 08 01")


def test_refuses_other_count_of_labels(folder: Path) -> None:
    path = folder / "t10k-labels-idx1-ubyte"
    path.write_bytes(idx(torch.zeros(TEST - 1)))
    refuses(folder, path.name, f"{TEST} labels", f"got {TEST - 1}")


def test_refuses_label_out_of_range(folder: Path) -> None:
    path = folder / "t10k-labels-idx1-ubyte"
    path.write_bytes(idx(torch.full((TEST,), 10)))
    refuses(folder, path.name, "0 to 9", "got 10")


def test_refuses_no_images(folder: Path) -> None:
    path = folder / "t10k-images-idx3-ubyte"
    path.write_bytes(idx(torch.zeros(0, 4, 3)))
    refuses(folder, path.name, "at least one image")


def test_refuses_two_image_sizes(folder: Path) -> None:
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(torch.zeros(TEST, 5, 5)))
    refuses(folder, "", "12 and 25 pixels")


def test_names_the_missing_files(folder: Path) -> None:
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"missing: t10k-labels-idx1-ubyte$"):
        data.load("auto", folder)


def test_checks_the_sha256(folder: Path) -> None:
    path = folder / "t10k-labels-idx1-ubyte"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(read_idx(path, 1, digest)) == TEST
    with pytest.raises(DataError, match=f"SHA-256 of its content must be {'0' * 64}, got {digest}"):
        read_idx(path, 1, "0" * 64)


class TestSearch:
    """Where Fashion-MNIST is looked for, with the network played by local files."""

    @pytest.fixture(autouse=True)
    def isolated(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The tiny set is the published one; nothing is installed, in the cache, or to be downloaded."""
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents().items()}
        monkeypatch.setattr(fashion_mnist, "SHA256", digests)
        monkeypatch.setattr(fashion_mnist, "SYSTEM", tmp_path / "usr/share/datasets/fashion-mnist")
        monkeypatch.setattr(fashion_mnist, "OFFICIAL", (tmp_path / "official").as_uri())
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        tools = tmp_path / "bin"
        tools.mkdir()
        monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
        self.tool(tmp_path, "apt-get", "echo 'E: no network' >&2; exit 100")
        self.cache = tmp_path / "cache/sparsekern/fashion-mnist"

    @staticmethod
    def tool(tmp_path: Path, name: str, script: str) -> None:
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    @staticmethod
    def publish(tmp_path: Path) -> None:
        (tmp_path / "official").mkdir()
        for name, content in contents().items():
            (tmp_path / "official" / f"{name}.gz").write_bytes(gzip.compress(content))

    def test_installed_package_first(self, tmp_path: Path, folder: Path) -> None:
        fashion_mnist.SYSTEM.parent.mkdir(parents=True)
        folder.rename(fashion_mnist.SYSTEM)
        assert data.load("auto").source == str(fashion_mnist.SYSTEM)

    def test_debian_package_without_root_or_package_lists(self, tmp_path: Path, folder: Path) -> None:
        """`apt-get download` fails until an `update` into folders of its own; `dpkg -x` unpacks."""
        self.tool(
            tmp_path,
            "apt-get",
            'case "$*" in *Dir::State::Lists=*update) : > listed ;; '
            "*download*) test -e listed && : > dataset-fashion-mnist_1_all.deb ;; esac",
        )
        target = f'"$3/{fashion_mnist.SYSTEM.relative_to("/")}"'
        self.tool(tmp_path, "dpkg", f'test -e "$2" && mkdir -p {target} && cp {folder}/* {target}')
        images = data.load("auto")
        assert images.name == "fashion-mnist"
        assert "Debian" in images.source
        assert data.load("auto").source == str(self.cache)
        assert [p.name for p in self.cache.parent.iterdir()] == [self.cache.name]

    def test_official_download_is_checked_and_cached(self, tmp_path: Path) -> None:
        self.publish(tmp_path)
        assert "official" in data.load("auto").source
        assert data.load("auto").source == str(self.cache)

    def test_a_wrong_download_is_refused_and_leaves_nothing(self, tmp_path: Path) -> None:
        self.publish(tmp_path)
        path = tmp_path / "official/train-labels-idx1-ubyte.gz"
        path.write_bytes(gzip.compress(idx(torch.zeros(TRAIN))))
        with pytest.raises(DataError, match=r"no network.*SHA-256 of its content must be"):
            data.load("fashion-mnist")
        assert not list(self.cache.parent.iterdir())

    def test_a_corrupt_cache_is_refused_by_name(self, tmp_path: Path) -> None:
        self.publish(tmp_path)
        data.load("auto")
        path = self.cache / "train-labels-idx1-ubyte.gz"
        path.write_bytes(path.read_bytes()[:30])
        with pytest.raises(DataError, match=re.escape(str(path))):
            data.load("auto")

    def test_falls_back_to_the_digits_and_says_so(self, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("sklearn")
        images = data.load("auto")
        assert images.name == "digits"
        assert (len(images.train), len(images.test)) == (1500, 297)
        said = capsys.readouterr().out
        assert "no network" in said
        assert "Falling back to scikit-learn's digits" in said

    def test_says_why_when_told_not_to_fall_back(self) -> None:
        with pytest.raises(fashion_mnist.NotFound, match=r"Debian's package.*no network.*official download"):
            data.load("fashion-mnist")

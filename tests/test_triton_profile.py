"""The tiles that ``tune`` measured: the file, and what is measured. No GPU: a made-up clock."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton: pip install triton", allow_module_level=True)

from sparsekern import cost_gpu, cost_triton, triton_profile
from sparsekern.benchmark import tune_triton
from sparsekern.dense import DENSE, NATIVE
from sparsekern.formats import parse_format
from sparsekern.formats.products import PRODUCTS
from sparsekern.triton_kernels import bsr_tiles, common
from sparsekern.triton_kernels.common import Config, Gpu

GPU = Gpu(132, 227 << 10, True)
ARGUMENTS = (torch.bfloat16, "ieee", 128, 32, 4096, 4096, GPU)
NAME = common.key("bsr", torch.bfloat16, "ieee", 128, 4096)


@pytest.fixture(autouse=True)
def clean() -> object:
    kept = dict(common.TUNED)
    yield
    common.TUNED.clear()
    common.TUNED.update(kept)
    common.forget()


def test_without_a_profile_arithmetic_chooses() -> None:
    common.forget()
    assert bsr_tiles.product_config(*ARGUMENTS)[:2] == (128, 256)
    few = bsr_tiles.product_config(torch.bfloat16, "ieee", 128, 32, 4096, 16, GPU)
    assert few.columns <= 32
    assert few.rows <= 32  # more programs than block rows
    small = bsr_tiles.product_config(torch.bfloat16, "ieee", 16, 256, 4096, 4096, GPU)
    assert small.rows == 16
    assert small.columns >= 128


def test_what_is_measured_is_chosen(tmp_path: Path) -> None:
    asked: list[Config] = []

    def call() -> None:
        asked.append(bsr_tiles.product_config(*ARGUMENTS))

    clock = iter([4.0, 3.0, 1.0, 2.0])

    def seconds(timed: object) -> float:
        call()
        return next(clock)

    best = tune_triton.fastest(call, seconds)
    assert list(best) == [NAME]
    assert best[NAME] == asked[3]  # asked[0] is the first call
    assert len(set(asked)) == 4
    assert not common.TUNED
    path = tmp_path / "tiles.json"
    triton_profile.write(path, best, {}, "a test")
    triton_profile.load(path)
    assert bsr_tiles.product_config(*ARGUMENTS) == best[NAME]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", "must be a profile of Triton's kernels"),
        ("[]", "must be a profile"),
        ('{"version": 1, "tiles": {}}', "no 'speedups'"),
        ('{"version": 1, "tiles": {}, "speedups": {"a": 0}}', "'a' must be how many times as fast, got 0"),
        (
            '{"version": 1, "tiles": {}, "speedups": {"a": "2"}}',
            "'a' must be how many times as fast, got '2'",
        ),
        ('{"version": 0, "tiles": {}}', "version must be 1, got 0"),
        ('{"version": 1}', "no 'tiles'"),
        ('{"version": 1, "tiles": {"a": [128, 256, 64, 8]}, "speedups": {}}', "'a' must be rows, columns"),
        ('{"version": 1, "tiles": {"a": [100, 256, 64, 8, 3]}, "speedups": {}}', "'a' must be rows, columns"),
        (
            '{"version": 1, "tiles": {"a": [128, 256, 64, 8, "3"]}, "speedups": {}}',
            "'a' must be rows, columns",
        ),
    ],
)
def test_files_that_are_no_profile(tmp_path: Path, text: str, error: str) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(text)
    with pytest.warns(RuntimeWarning, match=error):
        triton_profile.load(path)
    assert not common.TUNED
    triton_profile.load(tmp_path / "none.json")


def test_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSEKERN_TRITON_PROFILE", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200 (SXM)")
    assert triton_profile.profile_path().name == "triton-nvidia-h200-sxm.json"
    monkeypatch.setenv("SPARSEKERN_TRITON_PROFILE", str(tmp_path / "mine.json"))
    assert triton_profile.profile_path() == tmp_path / "mine.json"
    triton_profile.write(triton_profile.profile_path(), {NAME: Config(64, 128, 64, 4, 4)}, {}, "a test")
    assert json.loads((tmp_path / "mine.json").read_text())["tiles"] == {NAME: [64, 128, 64, 4, 4]}
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]


def test_kernels_that_were_measured_to_be_faster_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_triton, "of_device", lambda device: cost_gpu.HOPPER)
    pattern = parse_format("bsr64").random((256, 256), 0.5, None)
    call = (pattern, 100, torch.bfloat16, True, True)
    assert not cost_triton.beats_native(*call, NATIVE)
    found = {triton_profile.speedup_key("bsr32", torch.bfloat16, 256, True): 1.2}
    for speedups, chosen in ((found, True), (dict.fromkeys(found, 1.02), False)):
        monkeypatch.setattr(cost_triton, "SPEEDUPS", speedups)
        assert cost_triton.beats_native(*call, NATIVE) is chosen
    monkeypatch.setattr(cost_triton, "SPEEDUPS", found)
    for dense_is_slower in (True, False):
        monkeypatch.setattr(cost_triton, "beats_dense", lambda *at, found=dense_is_slower: found)
        assert cost_triton.beats_native(*call, DENSE) is dense_is_slower
    assert not cost_triton.beats_native(pattern, 300, torch.bfloat16, True, True, NATIVE)  # another batch
    assert not cost_triton.beats_native(pattern, 100, torch.bfloat16, False, False, NATIVE)  # inference


def test_what_is_compared_with_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = parse_format("bsr16").random((32, 48), 0.5, None)
    native = PRODUCTS["bsr"]
    monkeypatch.setattr(tune_triton.triton, "products", lambda format: native)
    clock = iter([6.0, 9.0, 2.0, 3.0])  # native forward, backward; Triton's

    def seconds(call: Callable[[], object]) -> float:
        call()
        return next(clock)

    assert tune_triton.ratios(pattern, torch.float32, 5, seconds) == {False: 3.0, True: 3.0}

"""Triton's kernels under its interpreter, and when they do not run."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sparsekern as sk
import torch
from cases import random_pattern
from sparsekern.formats import triton_products
from sparsekern.formats.triton_products import FORMATS

HERE = Path(__file__).parent
FOUND = importlib.util.find_spec("triton") is not None
OLD = (
    FOUND and importlib.metadata.version("triton") < "3.7" and np.lib.NumpyVersion(np.__version__) >= "2.4.0"
)
RUNS = {
    **{format: ["triton_interpreted.py", "-k", f"{format}- and not v{format}-"] for format in FORMATS},
    "masks": ["triton_interpreted_masks.py"],
}
"""What is interpreted, by name: arguments of pytest."""


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """Each in a process of its own: whether kernels are interpreted is settled early."""

    def run(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        return subprocess.run(
            [*command, *RUNS[name]],
            cwd=HERE,
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )

    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(run, name) for name in RUNS}


@pytest.mark.skipif(not FOUND, reason="needs Triton: pip install triton")
@pytest.mark.skipif(OLD, reason="the interpreter of Triton 3.6 needs numpy before 2.4")
@pytest.mark.parametrize("name", RUNS)
def test_under_the_interpreter(name: str, runs: dict[str, Future[subprocess.CompletedProcess[str]]]) -> None:
    done = runs[name].result()
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def refused(match: str) -> None:
    pattern = random_pattern("bsr4", (8, 8), 0.5)
    x, values = torch.randn(2, 8), torch.randn(pattern.values_shape)
    with pytest.raises(ValueError, match=match):
        sk.linear(x, values, pattern, backend="triton")
    assert torch.equal(sk.linear(x, values, pattern).detach(), sk.linear(x, values, pattern, backend="auto"))


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    triton_products._missing.cache_clear()
    refused(r'backend="triton" cannot run: Triton is not installed')
    triton_products._missing.cache_clear()


@pytest.mark.skipif(not FOUND or "TRITON_INTERPRET" in os.environ, reason="needs Triton, not interpreted")
def test_cpu_tensors_without_the_interpreter() -> None:
    refused("on the CPU it is only interpreted, for tests, with TRITON_INTERPRET=1")


@pytest.mark.skipif(not FOUND, reason="needs Triton: pip install triton")
def test_float64_is_refused() -> None:
    pattern = random_pattern("bsr4", (8, 8), 0.5)
    x, values = torch.randn(2, 8).double(), torch.randn(pattern.values_shape).double()
    with pytest.raises(ValueError, match=r"it takes torch.float32 or torch.bfloat16 or torch.float16"):
        sk.linear(x, values, pattern, backend="triton")


def test_importing_sparsekern_leaves_triton_alone() -> None:
    code = "import sys, sparsekern; assert 'sparsekern.triton_kernels' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not FOUND, reason="needs Triton: pip install triton")
def test_kernels_are_launched_on_the_gpu_of_their_first_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsekern.triton_kernels import bsr, common, csr, masks, nm, vnm

    current = [torch.device("cuda", 0)]

    @contextlib.contextmanager
    def device(other: torch.device) -> Iterator[None]:
        current.append(other)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    there: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))
    launch: Any = common.on_device(lambda first, index: (current[-1], index))
    assert launch(there, index=3) == (there.device, 3)
    assert launch(SimpleNamespace(is_cuda=False), index=3) == (torch.device("cuda", 0), 3)
    products = ("linear", "linear_backward_input", "linear_backward_weight")
    launching = [getattr(module, name) for module in (bsr, csr, nm, vnm) for name in products]
    for function in (*launching, masks.top_mask, masks.top_of_groups, masks.best_columns):
        assert function.__code__ is launch.__code__, function.__name__

"""As ``test_triton_compiled.py``, of the masks of the largest scores."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET"):
    pytest.skip("needs Triton, not interpreted: pip install triton", allow_module_level=True)

import torch
from sparsekern.formats import triton_masks
from sparsekern.triton_kernels import masks
from triton_compile import GPUS, Recorder, compile_for

LAUNCHED = ("_count_digits", "_next_digit", "_count_ties", "_mark", "_top_of_groups", "_best_columns")


def launches(dtype: torch.dtype, m: int) -> list[Any]:
    """Of all kernels, for scores of this dtype in groups of m."""
    recorder = Recorder()
    with contextlib.ExitStack() as stack:
        for name in LAUNCHED:
            stack.enter_context(mock.patch.object(masks, name, recorder(getattr(masks, name))))
        scores = torch.zeros(64, 512, dtype=dtype)
        masks.top_mask(scores, 100)
        masks.top_of_groups(scores, 2, m)
        masks.best_columns(scores, 16, max(4, min(m, 8)))
    return recorder.launches


def check(job: tuple[torch.dtype, int, int, int]) -> str:
    """What is wrong with one launch, "" if nothing."""
    dtype, m, i, arch = job
    kernel, args, options = launches(dtype, m)[i]
    made, stack = compile_for(arch, kernel, args, options)
    large = made.metadata.shared > GPUS[arch].shared
    return (
        f"{kernel.__name__} {job}: {stack} bytes spilled, {made.metadata.shared} shared"
        if stack or large
        else ""
    )


def jobs() -> Iterator[tuple[torch.dtype, int, int, int]]:
    """Each kernel once, for any dtype, group and architecture."""
    dtype = random.choice(triton_masks.DTYPES)
    seen = set()
    for i, (kernel, _, _) in enumerate(launches(dtype, 4)):
        if kernel not in seen:
            seen.add(kernel)
            yield dtype, random.choice((2, 4, 5, 8, 16)), i, random.choice(list(GPUS))


def test_what_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        wrong = [found for found in pool.map(check, jobs()) if found]
    assert not wrong, "\n".join(wrong)

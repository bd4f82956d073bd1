"""What this machine can do at most: multiply-adds per second, and bytes per second out of memory."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from .timing import quantile

_LAST_LEVEL_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


def cache_bytes() -> int:
    """Size of the last-level cache; 32 MiB where the system does not say."""
    try:
        text = _LAST_LEVEL_CACHE.read_text().strip()
    except OSError:
        return 32 << 20
    return int(text.rstrip("KM")) << {"K": 10, "M": 20}.get(text[-1], 0)


SOURCES = {
    "fma": "float32 FMAs on registers, in the ISA in use",
    "dot": "bfloat16 dot instructions on registers, for bfloat16 where the ISA in use has them",
    "matmul": "torch's dense product of a large square matrix, in the case's dtype",
    "sgemm": "torch's float32 1024³ product, a little below the FMA peak (sparsekern._native is not built)",
}
"""How a peak was measured."""


class Roofline:
    """Measures the peaks of ``threads`` threads, anew whenever it is asked: the clock drifts."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._native = native_module()
        self._square = torch.full((1024, 1024), 0.5)
        self._memory = torch.ones(4 * cache_bytes() // torch.float32.itemsize)

    def source(self, dtype: torch.dtype) -> str:
        """A key of :data:`SOURCES`: the peak of ``dtype``; "sgemm" only without ``sparsekern._native``."""
        if self._native is None:
            return "sgemm"
        dots = dtype == torch.bfloat16 and self._native.dot_peak(1, 0.0) > 0
        return "dot" if dots else "fma"

    def gflops(self, source: str) -> float:
        """GFLOP/s of a peak now, two per multiply-add."""
        if self._native is not None:
            measure = self._native.dot_peak if source == "dot" else self._native.fma_peak
            # 20 ms: long enough that torch's idle threads, which spin for some ms, have gone to sleep.
            return float(measure(self.threads, 0.02))
        square = self._square
        return 2 * square.shape[0] ** 3 / _fastest(lambda: square @ square, 3) / 1e9

    def read_gbs(self) -> float:
        """GB/s read from memory: ``torch.sum`` over four times the last-level cache."""
        return self._memory.nbytes / _fastest(self._memory.sum, 3) / 1e9


def native_module() -> Any:
    """The developer module ``sparsekern._native``, or None where it is not built: wheels come without it."""
    try:
        return importlib.import_module("sparsekern._native")
    except ImportError:
        return None


def _fastest(call: Callable[[], object], times: int) -> float:
    seconds = []
    for _ in range(times + 1):
        start = perf_counter()
        call()
        seconds.append(perf_counter() - start)
    return quantile(seconds[1:], 0.0)

"""Rows of benchmark results for tests: measured quickly, and made up."""

from __future__ import annotations

import torch
from sparsekern.benchmark import OURS, PEERS, Case, Contender, Facts, Row, run_case
from sparsekern.benchmark.roofline import Roofline


class Flat(Roofline):
    """A machine of known peaks, so that no test waits for the real one's."""

    def __init__(self) -> None:
        pass

    def source(self, dtype: torch.dtype) -> str:
        return "fma"

    def gflops(self, source: str) -> float:
        return 100.0

    def read_gbs(self) -> float:
        return 10.0


def rows_of(case: Case, contenders: tuple[Contender, ...] = (*OURS, *PEERS)) -> list[Row]:
    return run_case(case, contenders, Facts.now(), Flat(), rounds=2, min_seconds=1e-5)


def made_up(sparsity: float, backend: str, layout: str, ratio: float, **changes: object) -> Row:
    """A row as a run would leave it, with a chosen speed-up over dense, to test report and picture."""
    fields = {
        "run": "2026-01-01T00:00:00Z",
        "commit": "0",
        "machine": "CPU, 2 cores",
        "device": "avx2",
        "threads": 2,
        "torch": "2",
        "format": "csr",
        "product": "forward_backward",
        "out_features": 1024,
        "in_features": 1024,
        "batch": 1024,
        "sparsity": sparsity,
        "density": 1 - sparsity,
        "dtype": "float32",
        "weights": "warm",
        "backend": backend,
        "layout": layout,
        "median_ms": 12 / ratio,
        "p20_ms": 12 / ratio,
        "p80_ms": 12 / ratio,
        "speedup_vs_dense": ratio,
        "speedup_vs_torch_sparse": None,
        "peak_gflops": 200.0,
        "peak_source": "fma",
        "peak_fraction": 0.5,
        "read_gbs": 30.0,
        "read_fraction": 0.1,
    }
    return Row(**{**fields, **changes})  # type: ignore[arg-type]


def made_up_run() -> list[Row]:
    return [
        made_up(sparsity, backend, layout, ratio * factor, batch=batch)
        for batch, factor in ((512, 0.5), (1024, 2.0))
        for sparsity, ratio in ((0.5, 0.5), (0.8, 4.0), (0.9, 5.0))
        for backend, layout, ratio in (("native", "batch", ratio), ("dense", "batch", 1 / factor))
    ]

"""The results file: one CSV row per contender and case, only ever appended to."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .._library import LOAD_ERROR

OURS = ("native", "auto", "reference")
"""Backends of sparsekern."""

Key = tuple[str, str, int, int, int, float, str, str, str]


@dataclass(frozen=True)
class Row:
    """What one contender did in one case. Rows of one ``run`` were measured side by side.

    Fields:
        run: UTC start of the run, ISO 8601.
        commit: git commit of the sources, ``-dirty`` where they differ from it; or the installed version.
        machine: CPU and number of cores. device: the ISA of the native kernels, or the GPU.
        sparsity: as asked for. density: as it is, nnz / (out · in).
        format: the spec string, e.g. "bsr32". weights: "warm", the same tensors each time, or "cold", copies
            in turn that overflow the cache.
        backend: "native", "auto" and "reference" are sparsekern's. layout: of x, "batch" or "feature" major.
        median_ms, p20_ms, p80_ms: of one call.
        speedup_vs_dense, speedup_vs_torch_sparse: their time over this one's, median of paired readings.
        peak_gflops: the machine's peak, on a GPU that of dense products in the case's dtype; its median
            during the case. peak_source: which one, a key of :data:`~.roofline.SOURCES`.
        peak_fraction: 2 FLOP per multiply-add on a nonzero (on any weight, if dense), over what the peak
            allows in that time.
        read_gbs: memory's bandwidth before the case, of reading, on a GPU of copying.
        read_fraction: bytes of the values and of the indices that a product of few rows reads, over what
            memory gives in that time; beyond 1 where they stay in the cache.
    """

    run: str
    commit: str
    machine: str
    device: str
    threads: int
    torch: str
    format: str
    product: str
    out_features: int
    in_features: int
    batch: int
    sparsity: float
    density: float
    dtype: str
    weights: str
    backend: str
    layout: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    speedup_vs_dense: float | None
    speedup_vs_torch_sparse: float | None
    peak_gflops: float
    peak_source: str
    peak_fraction: float
    read_gbs: float
    read_fraction: float

    @property
    def case(self) -> Key:
        """What was computed, whoever did it."""
        size = (self.out_features, self.in_features, self.batch)
        return (self.run, self.product, *size, self.sparsity, self.dtype, self.weights, self.format)

    @property
    def ours(self) -> bool:
        """Whether sparsekern computed it."""
        return self.backend in OURS


HEADER = [field.name for field in fields(Row)]
_PARSERS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "float | None": lambda text: float(text) if text else None,
}


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add ``rows`` to the file at ``path``, which is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        _check_header(path)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(HEADER)
        writer.writerows([_text(value) for value in astuple(row)] for row in rows)


def read(path: Path) -> list[Row]:
    """All rows of the file at ``path``. Raises ``ValueError`` where it is not a results file, or broken."""
    _check_header(path)
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        for number, cells in enumerate(csv.reader(file), start=1):
            if number == 1:
                continue
            try:
                values = [
                    _PARSERS[str(field.type)](cell) for field, cell in zip(fields(Row), cells, strict=True)
                ]
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number}: must hold {len(HEADER)} fields of a row: {error}"
                ) from None
            rows.append(Row(*values))
    return rows


def last_run(rows: Iterable[Row]) -> list[Row]:
    """The rows of the newest run."""
    rows = list(rows)
    newest = max((row.run for row in rows), default="")
    return [row for row in rows if row.run == newest]


def _check_header(path: Path) -> None:
    with path.open(newline="", encoding="utf-8") as file:
        header = next(csv.reader(file), [])
    if header != HEADER:
        raise ValueError(
            f"{path} must be a results file with the columns {','.join(HEADER)}; got {','.join(header)}"
        )


def _text(value: object) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def commit() -> str:
    """The git commit of the sources this package runs from, or its installed version."""
    package = Path(__file__).resolve().parents[1]
    root = package.parents[1]
    if (root / ".git").exists() and package == root / "python" / "sparsekern":
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        if head:
            return head + ("-dirty" if _git(root, "status", "--porcelain", "--", "csrc", "python") else "")
    try:
        return metadata.version("sparsekern")
    except metadata.PackageNotFoundError:
        return "unknown"


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def machine() -> str:
    """The CPU's name and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def device() -> str:
    """The instruction set the native kernels chose, or "none" without them."""
    return str(torch.ops.sparsekern.isa()) if LOAD_ERROR is None else "none"

"""What the linear layers of a model are: the table of ``sparsekern.summary``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from .. import cost, cost_gpu, cost_triton, ops
from ..copies import has_mask_on_gpu, kept_bytes
from ..dense import DENSE, NATIVE
from .linear import SparseLinear


@dataclass(frozen=True)
class Row:
    """One layer of a :class:`Summary`. Bytes are those of the weight, without bias."""

    name: str
    format: str
    shape: tuple[int, int]
    nnz: int
    value_bytes: int
    index_bytes: int
    copy_bytes: int
    """Of the dense copies that products which run dense keep."""
    backend: str
    """What a training step runs."""
    speedup: float | None
    """Predicted time of a dense training step over that of this backend; None where nothing is predicted."""
    reason: str | None
    """Why the native kernels do not run where they could be expected to, or None."""

    @property
    def size(self) -> int:
        """``out · in``."""
        return self.shape[0] * self.shape[1]

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return 1.0 - self.nnz / self.size if self.size else 0.0


@dataclass(frozen=True, repr=False)
class Summary:
    """What :func:`summary` found; ``str()`` makes the table."""

    rows: tuple[Row, ...]
    model_bytes: int
    """Bytes of all parameters, buffers, indices and dense copies of the model."""
    dense_bytes: int
    """Bytes of the same model with every layer dense."""

    def __str__(self) -> str:
        size, nnz = sum(row.size for row in self.rows), sum(row.nnz for row in self.rows)
        cells = [("layer", "format", "shape", "sparsity", "values", "index", "vs dense", "backend")]
        reasons = list(dict.fromkeys(row.reason for row in self.rows if row.reason))
        for row in self.rows:
            note = f" [{reasons.index(row.reason) + 1}]" if row.reason else ""
            shape = f"{row.shape[0]} x {row.shape[1]}"
            gain = "-" if row.speedup is None else f"{row.speedup:.2g}x"
            cells.append((row.name or "(model)", row.format, shape, *_amounts(row), gain, row.backend + note))
        values, index = sum(row.value_bytes for row in self.rows), sum(row.index_bytes for row in self.rows)
        cells.append(
            ("total", "", "", f"{1 - nnz / size:.2%}" if size else "", _bytes(values), _bytes(index), "", "")
        )
        lines = list(_align(cells))
        rule = "-" * max(map(len, lines))
        share = f" ({self.model_bytes / self.dense_bytes:.0%})" if self.dense_bytes else ""
        copies = sum(row.copy_bytes for row in self.rows)
        kept = f", with {_bytes(copies)} of dense copies" if copies else ""
        closing = f"model {_bytes(self.model_bytes)}{kept}, dense {_bytes(self.dense_bytes)}{share}"
        notes = [f"[{i}] {reason}" for i, reason in enumerate(reasons, start=1)]
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], closing, *notes])

    __repr__ = __str__


def summary(model: nn.Module, *, batch: int = 256) -> Summary:
    """What each linear layer of ``model`` is: format, shape, sparsity, bytes, and which backend runs it.

    ``print(summary(model))`` shows a table; the numbers are in its ``rows``. "vs dense" is the predicted
    speed-up over an ``nn.Linear`` of a training step with ``batch`` rows of x, on the backend that runs it.
    :mod:`sparsekern.cost` predicts it, on GPUs by arithmetic, but not for ``"reference"``. Where a sparse
    layer does not run on the native kernels, a note below the table says why. Subclasses of ``nn.Linear`` are
    counted in the totals of the model only.

    Raises:
        TypeError: a model that is no module.
        ValueError: a batch that is no whole number of 1 or more.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if type(batch) is not int or batch < 1:
        raise ValueError(f"batch must be a whole number of 1 or more, got {batch!r}")
    rows, beside, saved = [], 0, 0
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            row = _sparse_row(name, module, batch)
            beside += row.index_bytes + row.copy_bytes
            saved += row.size * module.values.element_size() - row.value_bytes
            rows.append(row)
        elif type(module) is nn.Linear:
            shape = (module.out_features, module.in_features)
            size, nbytes = module.weight.numel(), module.weight.nbytes
            rows.append(Row(name, "dense", shape, size, nbytes, 0, 0, "torch", None, None))
    stored = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    return Summary(tuple(rows), stored + beside, stored + saved)


def _sparse_row(name: str, layer: SparseLinear, batch: int) -> Row:
    pattern = layer.pattern
    stored = (layer.values.nbytes, pattern.nbytes, kept_bytes(pattern))
    return Row(name, pattern.spec, pattern.shape, pattern.nnz, *stored, *_what_runs(layer, batch))


def _what_runs(layer: SparseLinear, batch: int) -> tuple[str, float | None, str | None]:
    """A row's backend, speed-up and reason."""
    backend, pattern, dtype, kind = layer.backend, layer.pattern, layer.values.dtype, layer.values.device.type
    if backend not in ops.BACKENDS:
        return backend, None, f"cannot run: backend must be one of {ops.BACKENDS}"
    reason = ops.unavailable(dtype, kind, pattern)
    if backend == "triton":
        return backend, None, ops.unavailable_in_triton(dtype, kind, pattern)
    if backend == "auto" and kind == "cuda" and reason is not None:
        if ops.unavailable_in_triton(dtype, kind, pattern) is not None:
            return "dense", None, reason
        wins = cost_triton.beats_dense(pattern, batch, dtype, True, True)
        if wins:
            return "triton", None, reason
        return "dense", None, f"Triton is not predicted to be faster, and {reason}"
    if reason is not None:
        return "dense" if backend == "auto" else backend, None, reason
    if kind not in ("cpu", "cuda") or backend == "reference":
        return "native" if backend == "auto" else backend, None, None
    asked = {"native": NATIVE, "dense": DENSE}.get(backend)
    if kind == "cpu":
        predicted = cost.predict(pattern, batch, dtype, plan=asked)
    else:
        facts, gpu = cost_gpu.Facts.of(pattern), cost_gpu.of_device(pattern.device)
        masked = has_mask_on_gpu(pattern, capturing=False)
        predicted = cost_gpu.predict(facts, batch, dtype, gpu, plan=asked, masked=masked)
    plan, speedup = predicted.plan, predicted.dense / predicted.seconds
    if backend != "auto" or plan == NATIVE:
        return "native" if plan == NATIVE else backend, speedup, None
    backend = " + ".join(sorted({by.value for by in plan}, reverse=True))  # native first
    how = " (by arithmetic, not yet measured on a GPU)" if kind == "cuda" else ""
    return backend, speedup, f"at batch {batch} the native kernels alone are not predicted to be faster{how}"


def _amounts(row: Row) -> tuple[str, str, str]:
    return f"{row.sparsity:.2%}", _bytes(row.value_bytes), _bytes(row.index_bytes) if row.index_bytes else "-"


def _bytes(count: int) -> str:
    """``count`` in the decimal unit in which it is below 1000."""
    amount, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 999.5:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.3g} {unit}"


def _align(cells: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Lines of a table whose columns are as wide as their widest cell; amounts are flush right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        padded = (
            c.rjust(w) if 2 <= i <= 6 else c.ljust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(padded).rstrip()

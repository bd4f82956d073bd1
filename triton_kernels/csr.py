"""CSR: products with an unstructured weight, on CUDA cores.

``linear`` and ``linear_backward_input`` are one kernel, which reads W transposed through its index, the
values as they stand. Every value meets a run of the batch: two numbers are loaded for a multiply-add, and x
bounds it. So x is read feature-major, where such a run is one piece of memory, 32 rows of x in 16 bits 64
bytes, 16 for each of 4 lanes. A batch-major x is copied first, which reads each number once where the product
reads it once for every value of its column. Programs that run at the same time share their run of the batch:
64 bytes of each column, 256 KB at 4096 columns, are about what the L1 cache of a Hopper multiprocessor holds;
twice that would come from L2, at a third of the speed. Up to 16 rows of x the values bound it, and lanes
share a row.

Rows of W stand in a program as they come, and it lasts as long as its longest: 8 % more than the mean for 16
rows of 410 values at random positions. Indices and values of a program are fewer than its threads: so each
lane loads those of its own run of x, where Triton would hand more of them on through shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import activate, check_contiguous, empty_like, feature_major, on_device, rounded, wrap_triton
from .csr_weight import Lanes, linear_backward_weight

__all__ = ["linear", "linear_backward_input", "linear_backward_weight"]


SINGLE, FEW, MANY = Lanes(4, 64, 1, 4), Lanes(4, 8, 16, 4), Lanes(16, 4, 32, 4)
"""Of the product: for one row of x, up to 16, and more."""


@on_device
def linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    pattern: list[Tensor],
    sizes: list[int],
    *,
    activation: int = 0,
) -> Tensor:
    """``y = σ(x Wᵀ + b)``."""
    row_ptr, col_idx, _, _, _ = pattern
    return _multiply(x, values, bias, row_ptr, col_idx, None, int(sizes[0]), activation)


@on_device
def linear_backward_input(grad: Tensor, values: Tensor, pattern: list[Tensor], sizes: list[int]) -> Tensor:
    """``dx = g W``."""
    _, _, t_row_ptr, t_col_idx, t_slot = pattern
    return _multiply(grad, values, None, t_row_ptr, t_col_idx, t_slot, int(sizes[1]), 0)


def _multiply(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    ptr: Tensor,
    idx: Tensor,
    slot: Tensor | None,
    rows: int,
    activation: int,
) -> Tensor:
    """``y = σ(x Wᵀ + b)``, or of W transposed."""
    check_contiguous(values=values, bias=bias)
    y = empty_like(x, rows)
    if y.numel() == 0:
        return y
    batch = x.shape[0]
    x = feature_major(x)
    lanes = lanes_of(batch)
    wrap_triton(_product)[(-(-rows // lanes.rows) * -(-batch // lanes.columns),)](
        *(x, values, ptr, idx, slot, bias, y, rows, batch, x.stride(1), y.stride(0), y.stride(1)),
        ROWS=lanes.rows,
        VALUES=lanes.values,
        COLUMNS=lanes.columns,
        ACTIVATION=activation,
        num_warps=lanes.warps,
    )
    return y


def lanes_of(batch: int) -> Lanes:
    """Of the product."""
    return SINGLE if batch == 1 else FEW if batch <= FEW.columns else MANY


@triton.jit
def _product(
    x,  # [batch, columns], its rows neighbours
    values,
    ptr,  # [rows + 1]
    idx,  # [nnz]
    slot,  # [nnz]: which of the values each is, or None: the same
    bias,  # [rows] or None
    y,  # [batch, rows]
    rows,
    batch,
    x_column,
    y_row,
    y_column,
    ROWS: tl.constexpr,
    VALUES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    row_blocks = tl.cdiv(rows, ROWS)
    row = tl.program_id(0) % row_blocks * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    line = (tl.program_id(0) // row_blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    in_batch = line < batch
    begin = tl.load(ptr + row, in_rows, 0)
    count = tl.load(ptr + row + 1, in_rows, 0) - begin
    begin = begin.to(tl.int64)
    sums = tl.zeros((ROWS, VALUES, COLUMNS), tl.float32)
    for first in tl.range(0, tl.max(count), VALUES):
        of_row = first + tl.arange(0, VALUES)
        there = of_row[None, :] < count[:, None]
        k = begin[:, None] + of_row[None, :]
        column = tl.load(idx + k, there, 0).to(tl.int64)
        if slot is not None:
            k = tl.load(slot + k, there, 0)
        value = tl.load(values + k, there, 0.0).to(tl.float32)
        # Not times 0: x may hold NaN where W has no value.
        inside = there[:, :, None] & in_batch[None, None, :]
        run = tl.load(x + column[:, :, None] * x_column + line[None, None, :], inside, 0.0)
        sums += value[:, :, None] * run.to(tl.float32)
    result = tl.sum(sums, 1)
    if bias is not None:
        result += tl.load(bias + row, in_rows, 0.0).to(tl.float32)[:, None]
    y_at = y + line[None, :] * y_row + row.to(tl.int64)[:, None] * y_column
    result = rounded(activate(result, ACTIVATION), y.dtype.element_ty)
    tl.store(y_at, result, in_rows[:, None] & in_batch[None, :])

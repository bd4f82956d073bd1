"""The gradient of CSR's values.

The gradient of the values is, unless they are few, the dense product of a tile on tensor cores, of which the
numbers where W has values are stored; tiles without one are skipped. Below one value in 100 (float32: 20) dot
products of single values are quicker, which read 2 bytes from L2 for a multiply-add: 5.5 TB/s against 600
TFLOP/s.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    Config,
    Gpu,
    bucket,
    choose,
    cycles,
    dot,
    feature_major,
    fitting,
    gpu_of,
    key,
    on_device,
    precision,
    remembered,
    rounded,
    wrap_triton,
)

ABSENT = tl.constexpr(2**31 - 1)  # a column that no value is in


class Lanes(NamedTuple):
    """How a program on CUDA cores goes over W.

    Attributes:
        rows: of W, at a time.
        values: of each row, at a time.
        columns: rows of x.
        warps: of a program.
    """

    rows: int
    values: int
    columns: int
    warps: int


TILES = (Config(128, 128, 64, 8, 3), Config(64, 64, 64, 4, 3), Config(32, 32, 64, 4, 3))
TILES_LONG = (Config(64, 64, 16, 8, 3), Config(32, 32, 32, 4, 3))
"""Of 16 bits; of float32."""


@on_device
def linear_backward_weight(grad: Tensor, x: Tensor, pattern: list[Tensor], sizes: list[int]) -> Tensor:
    """``dW = gᵀ x``, where W has values."""
    row_ptr, col_idx, _, _, _ = pattern
    (rows, columns), nnz, batch = map(int, sizes), int(col_idx.shape[0]), x.shape[0]
    grad_values = x.new_empty(nnz)
    if nnz == 0:
        return grad_values
    if single(nnz, rows, columns, x.dtype):
        grad, x = feature_major(grad), feature_major(x)
        lanes = dots_of(batch)
        parts = min(-(-nnz // (rows * lanes.values)), 65535)
        wrap_triton(_dots)[(rows, parts)](
            *(grad, x, row_ptr, col_idx, grad_values, batch, grad.stride(1), x.stride(1)),
            VALUES=lanes.values,
            COLUMNS=lanes.columns,
            num_warps=lanes.warps,
        )
        return grad_values
    config = tile(x.dtype, precision(), (rows, columns), bucket(batch), gpu_of(x.device))
    wrap_triton(_tiles)[(-(-rows // config.rows) * -(-columns // config.columns),)](
        *(grad, x, row_ptr, col_idx, grad_values, rows, columns, batch, columns.bit_length()),
        *(grad.stride(0), grad.stride(1), x.stride(0), x.stride(1)),
        ROWS=config.rows,
        COLUMNS=config.columns,
        STEP=config.step,
        STAGES=config.stages,
        VALUES=16,
        PRECISION=precision(),
        num_warps=config.warps,
    )
    return grad_values


def single(nnz: int, rows: int, columns: int, dtype: torch.dtype) -> bool:
    """Whether so few values are there that their gradients are dot products of single ones."""
    return nnz * (20 if dtype == torch.float32 else 100) < rows * columns


def dots_of(batch: int) -> Lanes:
    """Of dot products."""
    return Lanes(1, 16, 16 if batch <= 16 else 64 if batch <= 64 else 256, 4)


def tiles(dtype: torch.dtype, gpu: Gpu) -> list[Config]:
    """Of a dense product whose results are picked from: those that the GPU holds."""
    return fitting(TILES_LONG if dtype == torch.float32 else TILES, dtype.itemsize, gpu)


@remembered
def tile(dtype: torch.dtype, precision: str, shape: tuple[int, int], batch: int, gpu: Gpu) -> Config:
    """The one that is used, of a W where most tiles have values."""

    def cost(config: Config) -> float:
        count = -(-shape[0] // config.rows) * -(-shape[1] // config.columns)
        return cycles(config, count, -(-batch // config.step), dtype, gpu)

    return choose(key("csr weight", dtype, precision, batch), tiles(dtype, gpu), cost)


@triton.jit
def _dots(
    grad,  # [batch, rows], its rows neighbours
    x,  # [batch, columns], likewise
    ptr,
    idx,
    grad_values,
    batch,
    grad_column,
    x_column,
    VALUES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0)
    begin = tl.load(ptr + row)
    count = tl.load(ptr + row + 1) - begin
    grad += row.to(tl.int64) * grad_column
    for first in tl.range(tl.program_id(1) * VALUES, count, tl.num_programs(1) * VALUES):
        of_row = first + tl.arange(0, VALUES)
        there = of_row < count
        k = begin.to(tl.int64) + of_row
        x_at = x + tl.load(idx + k, there, 0).to(tl.int64)[:, None] * x_column
        sums = tl.zeros((VALUES, COLUMNS), tl.float32)
        for start in tl.range(0, batch, COLUMNS):
            line = start + tl.arange(0, COLUMNS)
            in_batch = (line < batch)[None, :]
            g = tl.load(grad + line[None, :], in_batch, 0.0).to(tl.float32)
            sums += g * tl.load(x_at + line[None, :], there[:, None] & in_batch, 0.0).to(tl.float32)
        tl.store(grad_values + k, rounded(tl.sum(sums, 1), grad_values.dtype.element_ty), there)


@triton.jit
def _tiles(
    grad,  # [batch, rows]
    x,  # [batch, columns]
    ptr,
    idx,
    grad_values,
    rows,
    columns,
    batch,
    halvings,
    grad_row,
    grad_column,
    x_row,
    x_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # of W
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    VALUES: tl.constexpr,  # of each row that are stored at a time
    PRECISION: tl.constexpr,
):
    row_blocks = tl.cdiv(rows, ROWS)
    row = tl.program_id(0) % row_blocks * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    c0 = tl.program_id(0) // row_blocks * COLUMNS
    column = c0 + tl.arange(0, COLUMNS)
    # Each row's first value at c0 or behind: by halving, in as many steps as its length can have bits.
    k = tl.load(ptr + row, in_rows, 0).to(tl.int64)
    end = tl.load(ptr + row + 1, in_rows, 0).to(tl.int64)
    stop = end
    for _ in range(halvings):
        middle = k + (stop - k) // 2
        before = (k < stop) & (tl.load(idx + middle, k < stop, 0) < c0)
        stop = tl.where(before, stop, middle)
        k = tl.where(before, middle + 1, k)
    following = tl.load(idx + k, k < end, ABSENT)
    if tl.min(following) < c0 + COLUMNS:
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        grad_at = grad + row.to(tl.int64)[:, None] * grad_column
        x_at = x + column.to(tl.int64)[None, :] * x_column
        for first in tl.range(0, batch, STEP, num_stages=STAGES):
            line = (first + tl.arange(0, STEP)).to(tl.int64)
            in_batch = line < batch
            g = tl.load(grad_at + line[None, :] * grad_row, in_rows[:, None] & in_batch[None, :], 0.0)
            x_mask = in_batch[:, None] & (column < columns)[None, :]
            part_of_x = tl.load(x_at + line[:, None] * x_row, x_mask, 0.0)
            sums = dot(g, part_of_x, sums, PRECISION)
        while tl.min(following) < c0 + COLUMNS:
            each = k[:, None] + tl.arange(0, VALUES)[None, :]
            place = tl.load(idx + each, each < end[:, None], ABSENT) - c0
            inside = place < COLUMNS
            found = tl.gather(sums, tl.where(inside, place, 0), 1)
            tl.store(grad_values + each, rounded(found, grad_values.dtype.element_ty), inside)
            k = tl.minimum(k + VALUES, end)
            following = tl.load(idx + k, k < end, ABSENT)

"""N values in each group of M columns of each row: the products of N:M and V:N:M, on tensor cores.

A tile of W is expanded in registers, :mod:`expand`, and multiplied as a dense one: the bytes of W shrink. In
V:N:M, of which 4 columns of each group are multiplied in ``linear`` and ``linear_backward_weight``, the
multiplies do too, to 4 of M. Their part of x is gathered, best from a feature-major x, in runs along the
batch: a batch-major one with more than 64 rows is copied first, 2 passes over x, where single numbers of 2
bytes would be gathered for each row tile.

Instructions bound the expansion: 14 per number of W in 2:4, with all that goes with it; 128 rows of x take
the tensor cores of a Hopper multiprocessor as long as 8 take to issue. So tiles have up to 256 rows of x.

``linear_backward_input`` of V:N:M multiplies zeros too. Of the selected columns alone it would be 4/M as
much, but each row tile adds to other columns then. Triton has no shared memory to add in; to move the
products to their columns takes a number through shared memory and 2 instructions for each number of the
result and each row tile, 3/64 of a cycle, where multiplying 128 rows of zeros takes 1/16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import activate, dot, outer_and, outer_sum, rounded
from .expand import expanded, expanded_wide


@triton.jit
def _columns(
    selected,
    group0,
    groups,
    columns,
    M: tl.constexpr,
    WIDTH: tl.constexpr,
    EACH: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Which columns of W the COUNT places of groups from ``group0`` on are, and whether they are any.

    Of their parts, where groups have EACH parts of WIDTH places.
    """
    place = tl.arange(0, COUNT)
    if selected is not None:
        place += group0 * WIDTH
        inside = place < groups * WIDTH
        column = tl.load(selected + place, inside, 0)
    elif M == WIDTH:
        column = group0 * M + place
        inside = column < columns
    else:
        part = group0 + place // WIDTH
        place = part % EACH * WIDTH + place % WIDTH
        column = part // EACH * M + place
        inside = (place < M) & (column < columns)
    return column, inside


@triton.jit
def _rows(block, rows, tile_rows, selected, ROWS: tl.constexpr):
    """The row tile that a block of ROWS rows of W is in, its rows, and whether they are any."""
    if selected is not None:
        blocks = tl.cdiv(tile_rows, ROWS)
        tile = block // blocks
        of_tile = block % blocks * ROWS + tl.arange(0, ROWS)
        row = tile * tile_rows + of_tile
        return tile, row, (of_tile < tile_rows) & (row < rows)
    else:
        row = block * ROWS + tl.arange(0, ROWS)
        return 0, row, row < rows


@triton.jit
def linear_kernel(
    x,  # [batch, columns]
    values,  # [rows, row_values]
    index,
    packed,
    selected,  # [row tiles, 4 · groups] or None
    bias,  # [rows] or None
    y,  # [batch, rows]
    rows,
    columns,
    batch,
    row_values,
    row_bytes,
    tile_rows,
    row_blocks,
    x_row,
    x_column,
    y_row,
    y_column,
    N: tl.constexpr,
    M: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``y = σ(x Wᵀ + b)``, a tile of it."""
    W_LEFT: tl.constexpr = COLUMNS < 64
    GROUPS: tl.constexpr = STEP // WIDTH
    groups = tl.cdiv(columns, M)
    tile, row, in_rows = _rows(tl.program_id(0) % row_blocks, rows, tile_rows, selected, ROWS)
    line = (tl.program_id(0) // row_blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    in_batch = line < batch
    if selected is not None:
        selected += tile.to(tl.int64) * groups * WIDTH
    if W_LEFT:
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    else:
        sums = tl.zeros((COLUMNS, ROWS), tl.float32)
    # A step ahead: a load that waits for another of its own step is not read as far ahead.
    column, in_columns = _columns(selected, 0, groups, columns, M, WIDTH, 1, STEP)
    for group0 in tl.range(0, groups, GROUPS, num_stages=STAGES):
        x_at = x + outer_sum(line * x_row, column.to(tl.int64) * x_column, not W_LEFT)
        part_of_x = tl.load(x_at, outer_and(in_batch, in_columns, not W_LEFT), 0.0)
        column, in_columns = _columns(selected, group0 + GROUPS, groups, columns, M, WIDTH, 1, STEP)
        w = expanded(
            values, index, packed, row, in_rows, group0, row_values, row_bytes, GROUPS, N, WIDTH, BITS
        )
        if W_LEFT:
            sums = dot(w, part_of_x, sums, PRECISION)
        else:
            sums = dot(part_of_x, w.T, sums, PRECISION)
    if W_LEFT:
        sums = sums.T
    if bias is not None:
        sums += tl.load(bias + row, in_rows, 0.0).to(tl.float32)[None, :]
    y_at = y + line[:, None] * y_row + row.to(tl.int64)[None, :] * y_column
    result = rounded(activate(sums, ACTIVATION), y.dtype.element_ty)
    tl.store(y_at, result, in_batch[:, None] & in_rows[None, :])


@triton.jit
def backward_input_kernel(
    grad,  # [batch, rows]
    values,  # [rows, row_values]
    index,
    packed,
    chosen,  # [row tiles, groups, 4] or None
    grad_x,  # [batch, columns]
    rows,
    columns,
    batch,
    row_values,
    row_bytes,
    tile_rows,
    grad_row,
    grad_column,
    x_row,
    x_column,
    N: tl.constexpr,
    M: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    EACH: tl.constexpr,  # parts of a group, WIDTH places each
    ROWS: tl.constexpr,  # columns of W
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``dx = g W``, a tile of it."""
    W_LEFT: tl.constexpr = COLUMNS < 64
    GROUPS: tl.constexpr = ROWS // WIDTH
    groups = tl.cdiv(columns, M)
    blocks = tl.cdiv(groups * EACH, GROUPS)
    group0 = tl.program_id(0) % blocks * GROUPS
    line = (tl.program_id(0) // blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    in_batch = line < batch
    if W_LEFT:
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    else:
        sums = tl.zeros((COLUMNS, ROWS), tl.float32)
    for row0 in tl.range(0, rows, STEP, num_stages=STAGES):
        row = row0 + tl.arange(0, STEP)
        grad_at = grad + outer_sum(line * grad_row, row.to(tl.int64) * grad_column, not W_LEFT)
        g = tl.load(grad_at, outer_and(in_batch, row < rows, not W_LEFT), 0.0)
        if chosen is not None:
            w = expanded_wide(
                values,
                index,
                chosen,
                row,
                row < rows,
                group0,
                row_values,
                groups,
                tile_rows,
                GROUPS,
                N,
                WIDTH,
                EACH,
            )
        else:
            w = expanded(
                values, index, packed, row, row < rows, group0, row_values, row_bytes, GROUPS, N, WIDTH, BITS
            )
        if W_LEFT:
            sums = dot(w.T, g, sums, PRECISION)
        else:
            sums = dot(g, w, sums, PRECISION)
    if W_LEFT:
        sums = sums.T
    column, in_columns = _columns(None, group0, groups, columns, M, WIDTH, EACH, ROWS)
    x_at = grad_x + line[:, None] * x_row + column.to(tl.int64)[None, :] * x_column
    tl.store(x_at, rounded(sums, grad_x.dtype.element_ty), in_batch[:, None] & in_columns[None, :])


@triton.jit
def backward_weight_kernel(
    grad,  # [batch, rows]
    x,  # [batch, columns]
    index,
    selected,  # [row tiles, 4 · groups] or None
    grad_values,  # [rows, row_values]
    rows,
    columns,
    batch,
    row_values,
    tile_rows,
    row_blocks,
    grad_row,
    grad_column,
    x_row,
    x_column,
    N: tl.constexpr,
    M: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # of W
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``dW = gᵀ x``: of a tile of it, what W has values for."""
    GROUPS: tl.constexpr = COLUMNS // WIDTH
    groups = tl.cdiv(columns, M)
    tile, row, in_rows = _rows(tl.program_id(0) % row_blocks, rows, tile_rows, selected, ROWS)
    group0 = tl.program_id(0) // row_blocks * GROUPS
    if selected is not None:
        selected += tile.to(tl.int64) * groups * WIDTH
    column, in_columns = _columns(selected, group0, groups, columns, M, WIDTH, 1, COLUMNS)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    grad_at = grad + row.to(tl.int64)[:, None] * grad_column
    x_at = x + column.to(tl.int64)[None, :] * x_column
    for first in tl.range(0, batch, STEP, num_stages=STAGES):
        line = (first + tl.arange(0, STEP)).to(tl.int64)
        g = tl.load(grad_at + line[None, :] * grad_row, in_rows[:, None] & (line < batch)[None, :], 0.0)
        part_of_x = tl.load(x_at + line[:, None] * x_row, (line < batch)[:, None] & in_columns[None, :], 0.0)
        sums = dot(g, part_of_x, sums, PRECISION)
    places = tl.reshape(sums, (ROWS, GROUPS, WIDTH))
    place = tl.arange(0, WIDTH)[None, None, :]
    row, in_rows = row.to(tl.int64)[:, None], in_rows[:, None]
    for i in range(N):
        k = (group0 + tl.arange(0, GROUPS)[None, :]) * N + i
        there = in_rows & (k < row_values)
        position = tl.load(index + row * row_values + k, there, 0)
        found = tl.sum(tl.where(position[:, :, None] == place, places, 0.0), 2)
        tl.store(grad_values + row * row_values + k, rounded(found, grad_values.dtype.element_ty), there)

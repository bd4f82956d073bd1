"""BSR: the gradient of the values, ``dW = gᵀ x`` where W has blocks.

A program has a run of blocks that stand beside each other in a row of blocks, which share the rows of g, or a
part of a large block. It sums over the whole batch alone, so the sums are the same each time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .bsr_tiles import weight_config
from .common import bucket, dot, gpu_of, on_device, outer_and, outer_sum, precision, rounded, wrap_triton


@on_device
def linear_backward_weight(grad: Tensor, x: Tensor, pattern: list[Tensor], sizes: list[int]) -> Tensor:
    """``dW = gᵀ x``, of each block."""
    out_features, in_features, height, width = map(int, sizes)
    row_ptr, col_idx, _, _, _, order, _ = pattern
    grad_values = x.new_empty((col_idx.shape[0], height, width))
    if grad_values.numel() == 0:
        return grad_values
    down, across = -(-out_features // height), -(-in_features // width)
    block, grid, batch = (height, width), (down, across), bucket(x.shape[0])
    config = weight_config(x.dtype, precision(), block, grid, batch, gpu_of(x.device))
    # A row may hold all blocks that fit in it: most programs find that theirs does not, and end.
    runs = -(-across * width // config.columns)
    wrap_triton(_weight)[(down * -(-height // config.rows) * runs,)](
        *(grad, x, grad_values, row_ptr, col_idx, order),
        *(x.shape[0], out_features, in_features, down),
        *(grad.stride(0), grad.stride(1), x.stride(0), x.stride(1)),
        HEIGHT=height,
        WIDTH=width,
        ROWS=config.rows,
        COLUMNS=config.columns,
        STEP=config.step,
        STAGES=config.stages,
        PRECISION=precision(),
        num_warps=config.warps,
    )
    return grad_values


@triton.jit
def _weight(
    grad,  # [batch, out]
    x,  # [batch, in]
    grad_values,  # [blocks, HEIGHT, WIDTH]
    ptr,  # [block_rows + 1]
    idx,  # [blocks]
    order,  # [block_rows]: rows of blocks, longest first
    batch,
    out_features,
    in_features,
    block_rows,
    grad_row,
    grad_column,
    x_row,
    x_column,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    PARTS: tl.constexpr = (HEIGHT + ROWS - 1) // ROWS
    W_LEFT: tl.constexpr = ROWS >= 64 or ROWS >= COLUMNS
    place = tl.program_id(0) % (block_rows * PARTS)
    run = tl.program_id(0) // (block_rows * PARTS)
    row = tl.load(order + place // PARTS)
    first = tl.load(ptr + row)
    last = tl.load(ptr + row + 1)
    if first + run * COLUMNS // WIDTH < last:
        r = place % PARTS * ROWS + tl.arange(0, ROWS)
        at = run * COLUMNS + tl.arange(0, COLUMNS)
        block = first + at // WIDTH
        there = block < last
        column = tl.load(idx + block, mask=there, other=0)
        column = tl.max_constancy(column, min(WIDTH, COLUMNS)).to(tl.int64) * WIDTH + at % WIDTH
        feature = (row * HEIGHT + r).to(tl.int64)
        in_rows = (r < HEIGHT) & (feature < out_features)
        in_columns = there & (column < in_features)
        k = tl.arange(0, STEP).to(tl.int64)
        g_at = outer_sum(grad + feature * grad_column, k * grad_row, W_LEFT)
        x_at = outer_sum(x + column * x_column, k * x_row, not W_LEFT)
        if W_LEFT:
            sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        else:
            sums = tl.zeros((COLUMNS, ROWS), tl.float32)
        for start in tl.range(0, batch, STEP, num_stages=STAGES):
            inside = start + k < batch
            g = tl.load(g_at, mask=outer_and(in_rows, inside, W_LEFT), other=0.0)
            part_of_x = tl.load(x_at, mask=outer_and(in_columns, inside, not W_LEFT), other=0.0)
            if W_LEFT:
                sums = dot(g, part_of_x, sums, PRECISION)
            else:
                sums = dot(part_of_x, g, sums, PRECISION)
            g_at += STEP * grad_row
            x_at += STEP * x_row
        if not W_LEFT:
            sums = sums.T
        values_at = (
            block.to(tl.int64)[None, :] * (HEIGHT * WIDTH) + r[:, None] * WIDTH + (at % WIDTH)[None, :]
        )
        inside = there[None, :] & (r < HEIGHT)[:, None]
        tl.store(grad_values + values_at, rounded(sums, grad_values.dtype.element_ty), mask=inside)

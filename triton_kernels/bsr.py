"""BSR: products with a weight of dense blocks, on tensor cores.

Both products with W are one kernel, ``_product``: for ``backward_input`` it reads W transposed, through the
index, values as they stand. A tile of the result belongs to one row of blocks, or to a part of it where they
are high; a step of its sum is a part of a block, or as many narrow blocks as fill it, whose columns of x are
gathered. Programs stay and take tile after tile: those of the rows with the most blocks come first, and each
second round goes backwards, so that all end at about the same time.

Where a tile is 64 high W is the left operand, of which Hopper's ``wgmma`` reads 64 rows at a time; else x is,
which has more rows. A number of x that was read is used ``rows`` times: with lower blocks the L2 cache is the
limit, not the multiplies.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .bsr_tiles import product_config
from .bsr_weight import linear_backward_weight
from .common import (
    activate,
    bucket,
    check_contiguous,
    dot,
    empty_like,
    gpu_of,
    on_device,
    outer_and,
    outer_sum,
    precision,
    resident,
    rounded,
    wrap_triton,
)

__all__ = ["linear", "linear_backward_input", "linear_backward_weight"]


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
    out_features, in_features, height, width = map(int, sizes)
    row_ptr, col_idx, _, _, _, order, _ = pattern
    y, index = empty_like(x, out_features), (row_ptr, col_idx, None, order)
    shape, block, strides = (out_features, in_features), (height, width), (width, 1)
    return _multiply(x, values, bias, y, index, shape, block, strides, activation)


@on_device
def linear_backward_input(grad: Tensor, values: Tensor, pattern: list[Tensor], sizes: list[int]) -> Tensor:
    """``dx = g W``."""
    out_features, in_features, height, width = map(int, sizes)
    _, _, ptr, row, slot, _, order = pattern
    grad_x, index = empty_like(grad, in_features), (ptr, row, slot, order)
    shape, block, strides = (in_features, out_features), (width, height), (1, width)
    return _multiply(grad, values, None, grad_x, index, shape, block, strides, 0)


def _multiply(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    y: Tensor,
    index: tuple[Tensor | None, ...],
    shape: tuple[int, int],
    block: tuple[int, int],
    strides: tuple[int, int],
    activation: int,
) -> Tensor:
    """``y = σ(x Wᵀ + b)``, or of W transposed: shape, block and its strides are as the product sees W."""
    check_contiguous(values=values, bias=bias)
    if y.numel() == 0:
        return y
    (features, depth), (height, width), batch, gpu = shape, block, x.shape[0], gpu_of(x.device)
    block_rows = -(-features // height)
    config = product_config(x.dtype, precision(), height, block_rows, depth, bucket(batch), gpu)
    wrap_triton(_product)[(gpu.multiprocessors * resident(config, x.dtype.itemsize, gpu),)](
        *(x, values, bias, y, *index, batch, features, depth, block_rows),
        *(x.stride(0), x.stride(1), y.stride(0), y.stride(1)),
        HEIGHT=height,
        DEPTH=width,
        DOWN=strides[0],
        ALONG=strides[1],
        ROWS=config.rows,
        COLUMNS=config.columns,
        STEP=config.step,
        STAGES=config.stages,
        RAGGED=depth % width != 0,
        ACTIVATION=activation,
        PRECISION=precision(),
        num_warps=config.warps,
    )
    return y


@triton.jit
def _find(
    idx,
    slot,
    first,
    last,
    step,
    k,
    depth,
    HEIGHT: tl.constexpr,
    DEPTH: tl.constexpr,
    ALONG: tl.constexpr,
    STEP: tl.constexpr,
):
    """What a step sums up: columns of x, or ``depth`` where there is none, and where in a block's row."""
    if STEP <= DEPTH:  # in one block
        block = first + step // (DEPTH // STEP)
        within = step % (DEPTH // STEP) * STEP + k
    else:
        block = first + step * (STEP // DEPTH) + k // DEPTH
        within = k % DEPTH
    there = block < last
    column = tl.load(idx + block, mask=there, other=0) * DEPTH
    if slot is not None:
        block = tl.load(slot + block, mask=there, other=0)
    if STEP > DEPTH:  # what is known of columns beside each other lets x be read in vectors
        column = tl.max_constancy(tl.where(there, column, depth), DEPTH)
        block = tl.max_constancy(block, DEPTH)
    column += within
    return column, block.to(tl.int64) * (HEIGHT * DEPTH) + within * ALONG


@triton.jit
def _product(
    x,  # [batch, depth]
    values,  # [blocks, ...]
    bias,  # [features] or None
    y,  # [batch, features]
    ptr,  # [block_rows + 1]
    idx,  # [blocks]: where in the sum each block stands
    slot,  # [blocks]: which block of values it is, or None: the same
    order,  # [block_rows]: rows of blocks, longest first
    batch,
    features,
    depth,
    block_rows,
    x_row,
    x_column,
    y_row,
    y_column,
    HEIGHT: tl.constexpr,
    DEPTH: tl.constexpr,
    DOWN: tl.constexpr,  # from a value to the next in HEIGHT,
    ALONG: tl.constexpr,  # and in DEPTH
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    RAGGED: tl.constexpr,  # the last block reaches past the end of the sum
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    PARTS: tl.constexpr = (HEIGHT + ROWS - 1) // ROWS
    W_LEFT: tl.constexpr = ROWS >= 64 or ROWS >= COLUMNS
    across = tl.cdiv(batch, COLUMNS)
    tiles = block_rows * PARTS * across
    programs = tl.num_programs(0)
    r = tl.arange(0, ROWS)
    k = tl.arange(0, STEP)
    for turn in range(0, tl.cdiv(tiles, programs)):
        place = tl.program_id(0)
        if turn % 2 == 1:
            place = programs - 1 - place
        tile = turn * programs + place
        if tile < tiles:
            place = tile // across
            row = tl.load(order + place // PARTS)
            part = place % PARTS * ROWS
            line = (tile % across).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
            first = tl.load(ptr + row)
            last = tl.load(ptr + row + 1)
            x_lines, w_lines = x + line * x_row, values + (part + r) * DOWN
            in_batch = line < batch
            if W_LEFT:
                sums = tl.zeros((ROWS, COLUMNS), tl.float32)
            else:
                sums = tl.zeros((COLUMNS, ROWS), tl.float32)
            # Where the next step reads is looked up a step ahead: a load that waits for another of its own
            # step is pipelined 1 step deep, not STAGES - 1.
            column, at = _find(idx, slot, first, last, 0, k, depth, HEIGHT, DEPTH, ALONG, STEP)
            for step in tl.range(0, tl.cdiv((last - first) * DEPTH, STEP), num_stages=STAGES):
                inside = column < depth
                w_at = outer_sum(w_lines, at, W_LEFT)
                if ROWS > HEIGHT or STEP > DEPTH:
                    w = tl.load(w_at, mask=outer_and(r < HEIGHT, inside, W_LEFT), other=0.0)
                else:
                    w = tl.load(w_at)
                if not RAGGED and STEP <= DEPTH:
                    inside = k >= 0  # all
                x_at = outer_sum(x_lines, column.to(tl.int64) * x_column, not W_LEFT)
                part_of_x = tl.load(x_at, mask=outer_and(in_batch, inside, not W_LEFT), other=0.0)
                column, at = _find(idx, slot, first, last, step + 1, k, depth, HEIGHT, DEPTH, ALONG, STEP)
                if W_LEFT:
                    sums = dot(w, part_of_x, sums, PRECISION)
                else:
                    sums = dot(part_of_x, w, sums, PRECISION)
            if W_LEFT:
                sums = sums.T
            feature = row * HEIGHT + part + r
            in_row = (feature < features) & (part + r < HEIGHT)
            if bias is not None:
                sums += tl.load(bias + feature, mask=in_row, other=0.0).to(tl.float32)[None, :]
            y_at = y + line[:, None] * y_row + feature.to(tl.int64)[None, :] * y_column
            result = rounded(activate(sums, ACTIVATION), y.dtype.element_ty)
            tl.store(y_at, result, mask=in_batch[:, None] & in_row[None, :])

"""W and its values along a bit mask: 1 bit per weight, where the columns take 16 per value.

For formats whose values stand row by row, by ascending column: all but BSR. Ops on memory that is there, for
:mod:`sparsekern.dense`; they know no autograd.

    ``mask_bits(columns, row_ptr, in_features) -> bits``   uint8 ``[out, ⌈in / 8⌉]``
    ``mask_expand(values, bits, row_ptr, dense)``          writes W, with its zeros, into ``dense``
    ``mask_compress(dense, bits, row_ptr, values)``        writes its values again

    ``mask_linear(x, values, bias, bits, row_ptr, activation) -> y``
    ``mask_linear_backward(grad, x, values, bits, row_ptr, need...) -> (grad_x, grad_values, grad_bias)``

Column c is bit ``c % 8`` of byte ``c // 8`` of its row; ``row_ptr``, int32 ``[out]``, says where the values
of each row begin.

On GPUs there are the products alone, in bfloat16 and float16, and no gradient of x. Their rows are padded to
whole spans of 128 columns: bits ``[out, ⌈in / 128⌉ · 16]``, row_ptr ``[out · ⌈in / 128⌉ + 1]``, how many
values stand before each span, the total at last. That is 1.25 bits per weight. To scatter and gather along
bits would save the difference to CSR's 4 bytes per value: at a density of 50 % 37 % of the bytes, at 20 % 20,
of what is a fifteenth of a training step there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import define
from .csr import Tiles

define("mask_bits(Tensor columns, Tensor row_ptr, int in_features) -> Tensor")
define("mask_expand(Tensor values, Tensor bits, Tensor row_ptr, Tensor(a!) dense) -> ()")
define("mask_compress(Tensor dense, Tensor bits, Tensor row_ptr, Tensor(a!) values) -> ()")
define(
    "mask_linear(Tensor x, Tensor values, Tensor? bias, Tensor bits, Tensor row_ptr, *, int activation=0)"
    " -> Tensor"
)
define(
    "mask_linear_backward(Tensor grad, Tensor x, Tensor values, Tensor bits, Tensor row_ptr, bool need_x, "
    "bool need_values) -> (Tensor, Tensor, Tensor)"
)

SPAN = 128
"""Columns between two starts on a GPU, as ``SK_MASK_SPAN``."""

expand = torch.ops.sparsekern.mask_expand.default
compress = torch.ops.sparsekern.mask_compress.default
linear = torch.ops.sparsekern.mask_linear.default
linear_backward = torch.ops.sparsekern.mask_linear_backward.default


def mask_of(tiles: Tiles, in_features: int) -> tuple[Tensor, Tensor]:
    """``(bits, row_ptr)`` of a pattern."""
    row_ptr = tiles.tile_ptr[0]
    return torch.ops.sparsekern.mask_bits(tiles.columns, row_ptr, in_features), row_ptr


def mask_on_gpu(shape: tuple[int, int], flat_index: Tensor) -> tuple[Tensor, Tensor]:
    """``(bits, row_ptr)`` for GPU kernels, of ascending int64 positions; waits for nothing."""
    out_features, in_features = shape
    spans = -(-in_features // SPAN)
    rows = torch.div(flat_index, max(in_features, 1), rounding_mode="floor")
    place = flat_index + rows * (spans * SPAN - in_features)
    words = torch.zeros(out_features * spans * (SPAN // 32), dtype=torch.int32, device=flat_index.device)
    bit = torch.bitwise_left_shift(torch.ones_like(place, dtype=torch.int32), (place & 31).to(torch.int32))
    words.scatter_add_(0, place >> 5, bit)  # a sum of different bits: no order changes it
    edges = torch.arange(out_features, device=place.device)[:, None] * (spans * SPAN)
    edges = edges + torch.arange(spans, device=place.device) * SPAN
    starts = torch.searchsorted(place, edges.view(-1), out_int32=True)
    total = starts.new_full((1,), flat_index.numel())
    return words.view(torch.uint8).view(out_features, spans * (SPAN // 8)), torch.cat([starts, total])


def _like(matrix: Tensor, features: int) -> Tensor:
    """``[batch, features]`` in the layout of ``matrix``."""
    if matrix.stride(0) == 1 and matrix.stride(1) != 1:
        return matrix.new_empty((features, matrix.shape[0])).t()
    return matrix.new_empty((matrix.shape[0], features))


@torch.library.register_fake("sparsekern::mask_linear")
def _empty_linear(
    x: Tensor, values: Tensor, bias: Tensor | None, bits: Tensor, row_ptr: Tensor, *, activation: int = 0
) -> Tensor:
    return _like(x, bits.shape[0])


@torch.library.register_fake("sparsekern::mask_linear_backward")
def _empty_backward(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    bits: Tensor,
    row_ptr: Tensor,
    need_x: bool,
    need_values: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _like(grad, x.shape[1]) if need_x else grad.new_empty(0),
        grad.new_empty(values.numel() if need_values else 0),
        grad.new_empty(grad.shape[1] if need_values else 0),
    )

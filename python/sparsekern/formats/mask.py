"""W and its values along a bit mask: 1 bit per weight, where the columns take 16 per value.

For formats whose values stand row by row, by ascending column: all but BSR. Ops on memory that is there, for
:mod:`sparsekern.dense`; they know no autograd.

    ``mask_bits(columns, row_ptr, in_features) -> bits``   uint8 ``[out, ⌈in / 8⌉]``
    ``mask_expand(values, bits, row_ptr, dense)``          writes W, with its zeros, into ``dense``
    ``mask_compress(dense, bits, row_ptr, values)``        writes its values again

Column c is bit ``c % 8`` of byte ``c // 8`` of its row; ``row_ptr``, int32 ``[out]``, says where the values
of each row begin.
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

expand = torch.ops.sparsekern.mask_expand.default
compress = torch.ops.sparsekern.mask_compress.default
linear = torch.ops.sparsekern.mask_linear.default
linear_backward = torch.ops.sparsekern.mask_linear_backward.default


def mask_of(tiles: Tiles, in_features: int) -> tuple[Tensor, Tensor]:
    """``(bits, row_ptr)`` of a pattern."""
    row_ptr = tiles.tile_ptr[0]
    return torch.ops.sparsekern.mask_bits(tiles.columns, row_ptr, in_features), row_ptr

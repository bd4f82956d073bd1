"""Unstructured sparsity: compressed sparse rows (CSR), its pattern, its ops and their gradients.

``y = x Wᵀ + b`` with ``W [out, in]`` given by ``values [nnz]`` at the pattern's positions, row by row.
The ops

    ``csr_linear(x, values, bias, pattern) -> y``                      y  = x Wᵀ + b
    ``csr_linear_backward_input(grad, values, pattern) -> grad_x``     dx = g W
    ``csr_linear_backward_weight(grad, x, pattern) -> grad_values``    dW = gᵀ x, only where W has a value
    ``csr_linear_backward(grad, x, values, pattern, need...)``         dx, dW and db = Σ g in one pass over g

are closed under differentiation, so gradients of any order work. They take ``pattern`` as the list
:meth:`CSR.tensors`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._library import define, has_kernel
from .pattern import Pattern, check_mask, top_count, top_mask

INT32_MAX = 2**31 - 1


class CSR(Pattern):
    """An unstructured pattern.

    Args:
        shape: ``(out_features, in_features)``.
        row_ptr: int32 ``[out + 1]``; row r owns the entries ``row_ptr[r] : row_ptr[r + 1]``.
        col_idx: int32 ``[nnz]``; columns, strictly ascending within a row.

    Raises:
        ValueError: wrong dtype, shape or contents; the message names the tensor, the rule and what was found.

    Derived when built, for the kernels:

    * ``tile_ptr`` int32 ``[tiles + 1, out]``: columns are cut into tiles of equal width, and row r's entries
      in tiles ``t : u`` are ``tile_ptr[t, r] : tile_ptr[u, r]``. A tile of x stays in the L1 cache while all
      rows pass over it.
    * ``t_tile_ptr`` int32 ``[row tiles + 1, in]``: the same of W transposed, for ``backward_input``.
    * ``t_slot`` int32 ``[nnz]``: where each entry stands in W transposed, sorted by column tile, row tile,
      column and row. The kernels transpose W as they read it, so values are stored once.
    """

    format = "csr"
    state_names = ("row_ptr", "col_idx")

    def __init__(self, shape: tuple[int, int], row_ptr: Tensor, col_idx: Tensor) -> None:
        self.shape = (int(shape[0]), int(shape[1]))
        _check_csr(self.shape, row_ptr, col_idx)
        self.row_ptr = row_ptr
        self.col_idx = col_idx
        self._derive()

    def _derive(self) -> None:
        out_features, in_features = self.shape
        width = tile_width(out_features, in_features, self.nnz)
        t_width = tile_width(in_features, out_features, self.nnz)
        if has_kernel("csr_derive", self.row_ptr.device.type):
            derived = _OPS.csr_derive(self.row_ptr, self.col_idx, in_features, width, t_width)
            self.tile_ptr, self.t_tile_ptr, self.t_slot = derived
        else:
            rows = self.row_idx()
            self.tile_ptr = _tile_ptr(rows, self.col_idx, out_features, in_features, width)
            self.t_tile_ptr = _tile_ptr(self.col_idx, rows, in_features, out_features, t_width)
            block = (self.col_idx // width) * (out_features // t_width + 1) + rows // t_width
            order = torch.argsort(block * in_features + self.col_idx, stable=True)  # stable, so rows ascend
            self.t_slot = torch.empty_like(self.col_idx)
            self.t_slot[order] = torch.arange(self.nnz, dtype=torch.int32, device=order.device)

    def row_idx(self) -> Tensor:
        """int64 ``[nnz]``: the row of each entry."""
        rows = torch.arange(self.shape[0], device=self.row_ptr.device)
        return torch.repeat_interleave(rows, self.row_ptr.diff(), output_size=self.col_idx.numel())

    @classmethod
    def from_mask(cls, mask: Tensor) -> CSR:
        """The pattern of a bool mask ``[out, in]``."""
        check_mask(mask)
        if mask.numel() > INT32_MAX and int(mask.sum()) > INT32_MAX:
            raise ValueError(f"mask must have at most {INT32_MAX} nonzeros, got {int(mask.sum())}")
        col_idx = mask.nonzero()[:, 1].to(torch.int32)
        return cls((mask.shape[0], mask.shape[1]), _counts_to_ptr(mask.sum(1)), col_idx)

    @classmethod
    def from_flat_index(cls, shape: tuple[int, int], flat_index: Tensor) -> CSR:
        """The pattern of ascending int64 positions in the flattened ``[out·in]`` weight. O(nnz) memory."""
        starts = torch.arange(shape[0] + 1, device=flat_index.device) * shape[1]
        row_ptr = torch.searchsorted(flat_index, starts).to(torch.int32)
        return cls(shape, row_ptr, torch.remainder(flat_index, max(shape[1], 1)).to(torch.int32))

    @classmethod
    def from_state(cls, shape: tuple[int, int], state: dict[str, Tensor]) -> CSR:
        """The pattern of ``row_ptr`` and ``col_idx``, checked completely. Raises as the class does."""
        return cls(shape, state["row_ptr"], state["col_idx"])

    @classmethod
    def prune(cls, scores: Tensor, sparsity: float) -> Tensor:
        """Bool mask of the ``round(numel · (1 − sparsity))`` largest ``scores``, ties to the lower index."""
        return top_mask(scores, top_count(scores.numel(), sparsity))

    @property
    def values_shape(self) -> tuple[int, ...]:
        """``(nnz,)``: the values stand row by row, as in ``col_idx``."""
        return (self.col_idx.numel(),)

    def flat_index(self) -> Tensor:
        """int64 ``[nnz]``: ``row · in + column`` of each entry; ascending."""
        return self.row_idx() * self.shape[1] + self.col_idx

    @property
    def device(self) -> torch.device:
        """Where the index tensors are."""
        return self.row_ptr.device

    def tensors(self) -> list[Tensor]:
        """``[row_ptr, col_idx, tile_ptr, t_tile_ptr, t_slot]``: what the ops take as ``pattern``."""
        return [self.row_ptr, self.col_idx, self.tile_ptr, self.t_tile_ptr, self.t_slot]

    def _map(self, fn: Callable[[Tensor], Tensor]) -> CSR:
        other = object.__new__(CSR)
        other.__dict__.update({k: fn(v) if isinstance(v, Tensor) else v for k, v in self.__dict__.items()})
        return other


def _counts_to_ptr(counts: Tensor) -> Tensor:
    """Exclusive prefix sum of ``counts [n]`` as int32 ``[n + 1]``."""
    ptr = torch.zeros(counts.numel() + 1, dtype=torch.int32, device=counts.device)
    ptr[1:] = counts.cumsum(0)
    return ptr


def tile_width(rows: int, cols: int, nnz: int) -> int:
    """Columns per tile: a power of two, at least 128.

    128 columns × 64 batch floats are 32 KB, the L1 cache. Fewer than 8 entries of a row per tile, on average,
    cost more than L1 misses, because each row's accumulators are loaded and stored once per tile: so tiles
    grow up to 1024 columns. Beyond that they grow while they hold less than one entry, so that ``tile_ptr``
    stays O(nnz).
    """
    width = 128
    while nnz * width < (8 if width < 1024 else 1) * rows * cols and width < 2**16:
        width *= 2
    return width


def _tile_ptr(rows: Tensor, cols: Tensor, n_rows: int, n_cols: int, width: int) -> Tensor:
    """int32 ``[tiles + 1, n_rows]``: where the entries of each row and column tile begin.

    For entries sorted by row, then column.
    """
    tiles = max(1, -(-n_cols // width))
    bins = rows.long() * tiles + torch.div(cols, width, rounding_mode="floor")
    ptr = _counts_to_ptr(torch.bincount(bins, minlength=n_rows * tiles))
    return torch.cat([ptr[:-1].view(n_rows, tiles).t(), ptr[tiles::tiles][None]]).contiguous()


def _check_csr(shape: tuple[int, int], row_ptr: Tensor, col_idx: Tensor) -> None:
    out_features, in_features = shape
    if out_features < 0 or in_features < 0 or max(shape) > INT32_MAX:
        raise ValueError(f"shape must be two sizes in [0, {INT32_MAX}], got {shape}")
    for name, tensor, what in (("row_ptr", row_ptr, f"[{out_features + 1}]"), ("col_idx", col_idx, "[nnz]")):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype != torch.int32 or tensor.dim() != 1:
            raise ValueError(f"{name} must be int32 {what}, got {tensor.dtype} {list(tensor.shape)}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got stride {tensor.stride()}")
    if row_ptr.numel() != out_features + 1:
        raise ValueError(
            f"row_ptr must have out_features + 1 = {out_features + 1} elements, got {row_ptr.numel()}"
        )
    if row_ptr.device != col_idx.device:
        raise ValueError(
            f"row_ptr and col_idx must be on one device, got {row_ptr.device} and {col_idx.device}"
        )
    if row_ptr.device.type == "meta":
        return
    if int(row_ptr[0]) != 0 or int(row_ptr[-1]) != col_idx.numel():
        raise ValueError(
            f"row_ptr must run from 0 to nnz = {col_idx.numel()}, got {int(row_ptr[0])} to {int(row_ptr[-1])}"
        )
    falling = (row_ptr[1:] < row_ptr[:-1]).nonzero()  # not diff(), which can overflow
    if falling.numel():
        raise ValueError(f"row_ptr must not decrease, got a decrease after row {int(falling[0])}")
    if col_idx.numel() == 0:
        return
    low, high = int(col_idx.min()), int(col_idx.max())
    if low < 0 or high >= in_features:
        raise ValueError(f"col_idx must be in [0, {in_features}), got values from {low} to {high}")
    # A step down is allowed only where a row starts.
    unsorted = col_idx[1:] <= col_idx[:-1]
    starts = row_ptr[1:-1].long()
    unsorted[starts[(starts > 0) & (starts < col_idx.numel())] - 1] = False
    if bool(unsorted.any()):
        entry = int(unsorted.nonzero()[0]) + 1
        raise ValueError(f"col_idx must ascend strictly within each row, but entry {entry} does not")


# --- ops ----------------------------------------------------------------------------------------------------

_OPS = torch.ops.sparsekern
_NO_GRADS = [None] * 5  # what torch.library wants for the list `pattern`

define(
    "csr_derive(Tensor row_ptr, Tensor col_idx, int in_features, int width, int t_width) "
    "-> (Tensor, Tensor, Tensor)"
)
define("csr_linear(Tensor x, Tensor values, Tensor? bias, Tensor[] pattern) -> Tensor")
define(
    "csr_linear_backward(Tensor grad, Tensor x, Tensor values, Tensor[] pattern, bool need_x, "
    "bool need_values, bool need_bias) -> (Tensor, Tensor, Tensor)"
)
define("csr_linear_backward_input(Tensor grad, Tensor values, Tensor[] pattern) -> Tensor")
define("csr_linear_backward_weight(Tensor grad, Tensor x, Tensor[] pattern) -> Tensor")

# Looked up once: it is on the path of every call.
_LINEAR: Callable[..., Tensor] = _OPS.csr_linear.default
_LINEAR_BACKWARD: Callable[..., tuple[Tensor, Tensor, Tensor]] = _OPS.csr_linear_backward.default


def csr_linear(x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern) -> Tensor:
    """``y = x Wᵀ + b`` by the native kernels, for a 2-D ``x [batch, in]``."""
    x = strided(x)
    tensors = pattern.tensors()
    if torch.compiler.is_compiling():
        return _LINEAR(x, values, bias, tensors)
    # The same op and gradients without torch.library's Python in between: 15 us per call instead of 55.
    if torch.is_grad_enabled():
        y: Tensor = _Linear.apply(x, values, bias, tensors)  # type: ignore[no-untyped-call]
        return y
    with torch._C._AutoDispatchBelowAutograd():
        return _LINEAR(x, values, bias, tensors)


def strided(matrix: Tensor) -> Tensor:
    """``matrix`` itself where a kernel can read it (one stride is 1), else a contiguous copy."""
    batch, features = matrix.shape
    s0, s1 = matrix.stride()
    if (s1 == 1 and s0 >= features) or (s0 == 1 and s1 >= batch):
        return matrix
    return matrix.contiguous()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, pattern: list[Tensor]) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.pattern = pattern
        with torch._C._AutoDispatchBelowAutograd():
            return _LINEAR(x, values, bias, pattern)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*_linear_backward(ctx, grad, below=not torch.is_grad_enabled())[:3], None)


def _setup_linear(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, list[Tensor]], output: Tensor
) -> None:
    x, values, _, pattern = inputs
    ctx.save_for_backward(x, values)
    ctx.pattern = pattern


def _linear_backward(ctx: Any, grad: Tensor, below: bool = False) -> tuple[Any, ...]:
    """The gradients; ``below`` autograd where no gradients of gradients are asked for."""
    x, values = ctx.saved_tensors  # not below: with checkpointing this runs the forward pass again
    need = ctx.needs_input_grad[:3]
    grad = strided(grad)
    with torch._C._AutoDispatchBelowAutograd() if below else contextlib.nullcontext():
        gradients = _LINEAR_BACKWARD(grad, x, values, ctx.pattern, *need)
    return (*(g if needed else None for g, needed in zip(gradients, need, strict=True)), _NO_GRADS)


# Second derivatives, by the same ops. With dx = g W, dW = gᵀ x and db = Σ g, and their gradients u, V and w:
#   d(g) = u Wᵀ + x Vᵀ + w,   d(x) = g V,   d(W) = gᵀ u


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, x, values, pattern, *need = inputs
    ctx.save_for_backward(grad, x, values)
    ctx.pattern, ctx.need = pattern, need


def _backward_backward(ctx: Any, u: Tensor, v: Tensor, w: Tensor) -> tuple[Any, ...]:
    grad, x, values = ctx.saved_tensors
    need_x, need_values, need_bias = ctx.need
    d_grad: Tensor | None = None
    if ctx.needs_input_grad[0]:
        terms = [_OPS.csr_linear.default(strided(u), values, None, ctx.pattern)] if need_x else []
        terms += [_OPS.csr_linear.default(x, v.contiguous(), None, ctx.pattern)] if need_values else []
        terms += [w.expand_as(grad)] if need_bias else []
        d_grad = sum(terms[1:], terms[0]) if terms else None
    d_x = d_values = None
    if need_values and ctx.needs_input_grad[1]:
        d_x = _OPS.csr_linear_backward_input.default(grad, v.contiguous(), ctx.pattern)
    if need_x and ctx.needs_input_grad[2]:
        d_values = _OPS.csr_linear_backward_weight.default(grad, strided(u), ctx.pattern)
    return d_grad, d_x, d_values, _NO_GRADS, None, None, None


def _setup_two(ctx: Any, inputs: tuple[Tensor, Tensor, list[Tensor]], output: Tensor) -> None:
    grad, other, pattern = inputs
    ctx.save_for_backward(grad, other)
    ctx.pattern = pattern


def _backward_input_backward(ctx: Any, u: Tensor) -> tuple[Any, ...]:
    grad, values = ctx.saved_tensors
    u = strided(u)
    return (
        _OPS.csr_linear.default(u, values, None, ctx.pattern) if ctx.needs_input_grad[0] else None,
        _OPS.csr_linear_backward_weight.default(grad, u, ctx.pattern) if ctx.needs_input_grad[1] else None,
        _NO_GRADS,
    )


def _backward_weight_backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
    grad, x = ctx.saved_tensors
    v = v.contiguous()
    return (
        _OPS.csr_linear.default(x, v, None, ctx.pattern) if ctx.needs_input_grad[0] else None,
        _OPS.csr_linear_backward_input.default(grad, v, ctx.pattern) if ctx.needs_input_grad[1] else None,
        _NO_GRADS,
    )


# What the ops return, for torch.compile. Layouts as in csrc/torch/common.h.


def _empty_matrix(like: Tensor, features: int) -> Tensor:
    """``[batch, features]`` in the layout of ``like``.

    Feature-major (strides ``(1, batch)``) in, feature-major out.
    """
    batch = like.shape[0]
    if like.stride(0) == 1 and like.stride(1) != 1:
        return like.new_empty((features, batch)).t()
    return like.new_empty((batch, features))


def _one_device(op: str, x: Tensor, pattern: list[Tensor]) -> None:
    devices = {str(tensor.device) for tensor in pattern}
    if devices != {str(x.device)}:
        raise RuntimeError(f"sparsekern::{op}: pattern must be on {x.device}, got {sorted(devices)}")


def _empty_linear(x: Tensor, values: Tensor, bias: Tensor | None, pattern: list[Tensor]) -> Tensor:
    _one_device("csr_linear", x, pattern)
    return _empty_matrix(x, pattern[0].shape[0] - 1)


def _empty_backward(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    pattern: list[Tensor],
    need_x: bool,
    need_values: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _one_device("csr_linear_backward", grad, pattern)
    return (
        _empty_matrix(grad, pattern[3].shape[1]) if need_x else grad.new_empty(0),
        grad.new_empty(pattern[1].shape[0] if need_values else 0),
        grad.new_empty(grad.shape[1] if need_bias else 0),
    )


def _empty_backward_input(grad: Tensor, values: Tensor, pattern: list[Tensor]) -> Tensor:
    _one_device("csr_linear_backward_input", grad, pattern)
    return _empty_matrix(grad, pattern[3].shape[1])


def _empty_backward_weight(grad: Tensor, x: Tensor, pattern: list[Tensor]) -> Tensor:
    _one_device("csr_linear_backward_weight", grad, pattern)
    return x.new_empty(pattern[1].shape)


for _op, _backward, _setup, _empty in (
    ("csr_linear", _linear_backward, _setup_linear, _empty_linear),
    ("csr_linear_backward", _backward_backward, _setup_backward, _empty_backward),
    ("csr_linear_backward_input", _backward_input_backward, _setup_two, _empty_backward_input),
    ("csr_linear_backward_weight", _backward_weight_backward, _setup_two, _empty_backward_weight),
):
    torch.library.register_autograd(f"sparsekern::{_op}", _backward, setup_context=_setup)
    torch.library.register_fake(f"sparsekern::{_op}", _empty)

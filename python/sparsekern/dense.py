"""Products in which torch's dense ones have a part: for patterns too dense to gain from sparse kernels alone.

A dense copy of W stands in for its values. It is kept while they do not change, so inference scatters them
once. Torch counts most changes (optimizers, in-place operations, ``load_state_dict``), but not those through
``.data`` or NumPy. While gradients are recorded all values are summed up to find these too; inference, where
that could cost as much as the product, compares 256 of them. Write under ``torch.no_grad()`` instead.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .formats import Pattern
from .formats.products import PRODUCTS, strided


class Plan(NamedTuple):
    """Who computes what: True for torch's dense product, False for the native kernel.

    The native kernels compute both gradients in one pass. The dense gradient of W is gathered from.
    """

    forward: bool
    grad_x: bool
    grad_values: bool


NATIVE = Plan(False, False, False)
DENSE = Plan(True, True, True)


def planned_linear(x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern, plan: Plan) -> Tensor:
    """``y = x Wᵀ + b`` for a 2-D x of a dtype that the native kernels take, as ``plan`` says.

    Values of another dtype than x's are cast, once for a dense copy.
    """
    x = strided(x)
    if torch.is_grad_enabled():
        y: Tensor = _Planned.apply(x, values, bias, pattern, plan)  # type: ignore[no-untyped-call]
        return y
    weight = _weight(values, pattern, x.dtype, whole=False) if plan.forward else None
    return _forward(x, weight, values, bias, pattern)


def scattered_linear(x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern) -> Tensor:
    """``y = x Wᵀ + b`` by torch's dense product, from differentiable ops: for other dtypes, and compiled."""
    return torch.nn.functional.linear(x, _scatter(values, pattern), bias)


class _Planned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern, plan: Plan
    ) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.pattern, ctx.plan = pattern, plan
        need_copy = plan.forward or (plan.grad_x and ctx.needs_input_grad[0])
        weight = _weight(values, pattern, x.dtype, whole=True) if need_copy else None
        ctx.weight = weight if plan.grad_x else None
        return _forward(x, weight if plan.forward else None, values, bias, pattern)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pattern, plan = ctx.pattern, ctx.plan
        products = PRODUCTS[pattern.format]
        need_x, need_values, need_bias = need = ctx.needs_input_grad[:3]
        x, values = ctx.saved_tensors  # once: with checkpointing this runs the forward pass again
        where: tuple[list[Tensor], list[int]] = pattern.operands
        # Gradients of gradients are the native ops': they hold for any plan.
        if torch.is_grad_enabled() or not (plan.grad_x or plan.grad_values):
            below = not torch.is_grad_enabled()
            return (*products.gradients(grad, x, values.to(x.dtype), *where, need, below), None, None)
        grad_x = grad_values = grad_bias = None
        if need_x and plan.grad_x:
            grad_x = grad @ ctx.weight
            need_x = False
        if need_values and plan.grad_values:
            if is_dense(pattern):
                grad_values = (grad.t() @ x).view(values.shape)
            else:
                dense = torch.mm(grad.t(), x, out=_scratch(pattern.shape, x))
                grad_values = products.gather(dense, *where)
            grad_bias = grad.sum(0) if need_bias else None
            need_values = need_bias = False
        if need_x or need_values or need_bias:
            need = (need_x, need_values, need_bias)
            rest = products.gradients(grad, x, values.to(x.dtype), *where, need, below=True)
            grad_x, grad_values, grad_bias = (
                a if b is None else b for a, b in zip((grad_x, grad_values, grad_bias), rest, strict=True)
            )
        return grad_x, grad_values, grad_bias, None, None


def _forward(
    x: Tensor, weight: Tensor | None, values: Tensor, bias: Tensor | None, pattern: Pattern
) -> Tensor:
    """y, by the dense product where there is a copy of W; feature-major for a feature-major x."""
    if weight is None:
        with torch.no_grad():
            return PRODUCTS[pattern.format].linear(x, values.to(x.dtype), bias, pattern)
    if x.stride(0) == 1 and x.stride(1) != 1:
        # Into y itself: a view that is made inside an autograd.Function must not be changed in place later.
        y = torch.empty_strided(
            (x.shape[0], weight.shape[0]), (1, x.shape[0]), dtype=x.dtype, device=x.device
        )
        if bias is None:
            torch.mm(weight, x.t(), out=y.t())
        else:
            torch.addmm(bias[:, None], weight, x.t(), out=y.t())
        return y
    return torch.nn.functional.linear(x, weight, bias)


_KEPT = threading.local()


def _scratch(shape: tuple[int, int], like: Tensor) -> Tensor:
    """Memory for a dense gradient of W, the same each time: fresh pages can cost as much as the product."""
    size = shape[0] * shape[1]
    kept: dict[Any, Tensor] = _KEPT.__dict__
    if like.dtype not in kept or kept[like.dtype].numel() < size:
        kept[like.dtype] = like.new_empty(size)
    return kept[like.dtype][:size].view(shape)


def _scatter(values: Tensor, pattern: Pattern) -> Tensor:
    weight: Tensor = PRODUCTS[pattern.format].scatter(values.contiguous(), pattern.tensors(), pattern.sizes())
    return weight


def is_dense(pattern: Pattern) -> bool:
    """Whether the values are W itself, row by row."""
    return pattern.format != "bsr" and pattern.nnz == pattern.shape[0] * pattern.shape[1]


class _Copy(NamedTuple):
    """A dense copy, and what it was made of.

    ``some`` is a view of the values: while it lives, no other tensor has their address.
    """

    weight: Tensor
    address: int
    version: int
    some: Tensor
    sample: Tensor
    checksum: int


def _weight(values: Tensor, pattern: Pattern, dtype: torch.dtype, *, whole: bool) -> Tensor:
    """W in ``dtype``: the copy that the pattern remembers, or a new one where the values changed.

    Args:
        values: those of W; the last ones that were asked for are remembered for each dtype.
        pattern: where they are.
        dtype: of the copy.
        whole: whether all values are compared, not some.
    """
    values = values.detach()
    if is_dense(pattern):
        return values.view(pattern.shape).to(dtype)
    if (
        values.is_inference() or not values.is_contiguous()
    ):  # such tensors count no versions, or have no flat view
        return _scatter(values, pattern).to(dtype)
    key, version, address = ("copy", dtype), values._version, values.data_ptr()
    copy: _Copy | None = pattern.memo.get(key)
    if copy is not None and copy.version == version and copy.address == address:
        same = _checksum(values) == copy.checksum if whole else torch.equal(copy.some, copy.sample)
        if same:
            return copy.weight
    weight, some = _scatter(values, pattern).to(dtype), _some(values)
    pattern.memo[key] = _Copy(weight, address, version, some, some.clone(), _checksum(values))
    return weight


def kept_bytes(pattern: Pattern) -> int:
    """The bytes of the dense copies that the pattern remembers."""
    return sum(copy.weight.nbytes for copy in pattern.memo.values() if isinstance(copy, _Copy))


def _some(values: Tensor) -> Tensor:
    """A view of 16 runs of 16 values, or of all if there are less than 256."""
    flat = values.view(-1)
    size = flat.numel()
    return flat if size < 256 else flat.as_strided((16, 16), (size // 16, 1), flat.storage_offset())


def _checksum(values: Tensor) -> int:
    """The sum of the values' bits, as integers of 8 bytes: ten times as fast as comparing them."""
    raw = values.view(-1).view(torch.uint8)
    even = raw.numel() // 8 * 8
    rest = int(raw[even:].sum()) if even < raw.numel() else 0
    aligned = raw[:even].storage_offset() % 8 == 0
    return int(raw[:even].view(torch.int64).sum()) + rest if aligned else int(raw.sum())

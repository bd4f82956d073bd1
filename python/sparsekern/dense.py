"""Products in which torch's dense ones have a part: for patterns too dense to gain from sparse kernels alone.

A dense copy of W stands in for its values. It is kept while they do not change, so inference scatters them
once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

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
    """``y = x Wᵀ + b`` for a 2-D x of a dtype that the native kernels take, as ``plan`` says."""
    x = strided(x)
    if torch.is_grad_enabled():
        y: Tensor = _Planned.apply(x, values, bias, pattern, plan)  # type: ignore[no-untyped-call]
        return y
    return _forward(x, _kept_copy(values, pattern) if plan.forward else None, values, bias, pattern)


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
        weight = _kept_copy(values, pattern) if need_copy else None
        ctx.weight = weight if plan.grad_x else None
        return _forward(x, weight if plan.forward else None, values, bias, pattern)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        products, plan = PRODUCTS[ctx.pattern.format], ctx.plan
        need_x, need_values, need_bias = need = ctx.needs_input_grad[:3]
        x, values = ctx.saved_tensors  # once: with checkpointing this runs the forward pass again
        where: tuple[list[Tensor], list[int]] = ctx.pattern.operands
        # Gradients of gradients are the native ops': they hold for any plan.
        if torch.is_grad_enabled() or not (plan.grad_x or plan.grad_values):
            below = not torch.is_grad_enabled()
            return (*products.gradients(grad, x, values, *where, need, below), None, None)
        grad_x = grad_values = grad_bias = None
        if need_x and plan.grad_x:
            grad_x = grad @ ctx.weight
            need_x = False
        if need_values and plan.grad_values:
            grad_values = products.gather((grad.t() @ x).contiguous(), *where)
            grad_bias = grad.sum(0) if need_bias else None
            need_values = need_bias = False
        if need_x or need_values or need_bias:
            rest = products.gradients(grad, x, values, *where, (need_x, need_values, need_bias), below=True)
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
            return PRODUCTS[pattern.format].linear(x, values, bias, pattern)
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


def _scatter(values: Tensor, pattern: Pattern) -> Tensor:
    weight: Tensor = PRODUCTS[pattern.format].scatter(values.contiguous(), pattern.tensors(), pattern.sizes())
    return weight


# values -> what W was made of, to know whether it is up to date, and W.
_COPIES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

_SAMPLE = 1024
"""Values that are compared before a copy is used again: ``.data`` changes them without a new version, all of
them as a rule (moving averages, another initialization)."""


class _Made(NamedTuple):
    version: int
    address: int
    pattern: Pattern
    sample: Tensor


def _kept_copy(values: Tensor, pattern: Pattern) -> Tensor:
    """The dense copy of ``values``, made anew where they changed."""
    if values.is_inference():  # such a tensor does not count its versions
        return _scatter(values, pattern)
    flat = values.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // _SAMPLE)]
    kept = _COPIES.get(values)
    if kept is not None:
        made, weight = kept
        same = made.version == values._version and made.address == values.data_ptr()
        if same and made.pattern is pattern and torch.equal(made.sample, sample):
            copy: Tensor = weight
            return copy
    weight = _scatter(values, pattern)
    _COPIES[values] = (_Made(values._version, values.data_ptr(), pattern, sample.clone()), weight)
    return weight

"""Products for patterns too dense to gain from sparse kernels alone: by torch, or along a bit mask.

Along the mask (:mod:`.formats.mask`) W is expanded piece by piece in the caches, on a GPU in registers: only
values and mask pass through memory. Torch's products need a dense copy of W (:mod:`.copies`).

A training step by them, whose values are new each time, is bound by memory: it reads the values, writes W,
reads the dense gradient and writes that of the values. Nothing else passes over as much, and all of it stays
in memory that is kept.
"""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .copies import gather, is_dense, leased_weight_of, mask_operands, scatter_by_format, scratch, weight_of
from .formats import Pattern, mask
from .formats.products import ACTIVATION_CODES, ACTIVATIONS, PRODUCTS, strided


class By(enum.Enum):
    """Who computes a product: the format's own kernel, torch with a dense W, or the mask's kernel."""

    NATIVE = "native"
    DENSE = "dense"
    MASK = "mask"


class Plan(NamedTuple):
    """Who computes what.

    The native kernels compute both gradients in one pass. The dense gradient of W is gathered from.
    """

    forward: By
    grad_x: By
    grad_values: By


NATIVE = Plan(By.NATIVE, By.NATIVE, By.NATIVE)
DENSE = Plan(By.DENSE, By.DENSE, By.DENSE)
MASK = Plan(By.MASK, By.MASK, By.MASK)


def planned_linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    pattern: Pattern,
    plan: Plan,
    activation: str | None = None,
) -> Tensor:
    """``y = σ(x Wᵀ + b)`` for a 2-D x of a dtype that the native kernels take, as ``plan`` says.

    Values of another dtype than x's are cast, once for a dense copy.
    """
    x = strided(x)
    if torch.is_grad_enabled():
        y: Tensor = _apply(x, values, bias, pattern, plan)  # type: ignore[no-untyped-call]
        return ACTIVATIONS[activation](y)
    if plan.forward is By.MASK:
        return _along_mask(x, values, bias, pattern, activation)
    weight = weight_of(values, pattern, x.dtype) if plan.forward is By.DENSE else None
    return ACTIVATIONS[activation](_forward(x, weight, values, bias, pattern))


def scattered_linear(x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern) -> Tensor:
    """``y = x Wᵀ + b`` by torch's dense product, from differentiable ops: for other dtypes, and compiled."""
    return torch.nn.functional.linear(x, scatter_by_format(values, pattern), bias)


class _Planned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern, plan: Plan
    ) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.pattern, ctx.plan = pattern, plan
        if plan.grad_values is By.MASK:  # made here: the backward pass alone may go into a CUDA graph
            mask_operands(pattern)
        kept = plan.grad_x is By.DENSE and ctx.needs_input_grad[0]
        weight = None
        if kept or plan.forward is By.DENSE:
            weight, lease = leased_weight_of(values, pattern, x.dtype)
            if kept:
                ctx.weight, ctx.lease = weight, lease
        if plan.forward is By.MASK:
            return _along_mask(x, values, bias, pattern)
        return _forward(x, weight if plan.forward is By.DENSE else None, values, bias, pattern)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pattern, plan = ctx.pattern, ctx.plan
        products = PRODUCTS[pattern.format]
        need_x, need_values, need_bias = need = ctx.needs_input_grad[:3]
        x, values = ctx.saved_tensors  # once: with checkpointing this runs the forward pass again
        where: tuple[list[Tensor], list[int]] = pattern.operands
        # Gradients of gradients are the native ops': they hold for any plan.
        if torch.is_grad_enabled() or plan.grad_x is plan.grad_values is By.NATIVE:
            below = not torch.is_grad_enabled()
            return (*products.gradients(grad, x, values.to(x.dtype), *where, need, below), None, None)
        grad_x = grad_values = grad_bias = None
        masked = need_x and plan.grad_x is By.MASK, need_values and plan.grad_values is By.MASK
        if any(masked):
            numbers = values.to(x.dtype).contiguous()
            found = mask.linear_backward(strided(grad), x, numbers, *mask_operands(pattern), *masked)
            if masked[0]:
                grad_x, need_x = found[0], False
            if masked[1]:
                grad_values, grad_bias = found[1].view(values.shape), found[2] if need_bias else None
                need_values = need_bias = False
        if need_x and plan.grad_x is By.DENSE:
            grad_x = grad @ ctx.weight
            need_x = False
        if need_values and plan.grad_values is By.DENSE:
            if is_dense(pattern):
                grad_values = (grad.t() @ x).view(values.shape)
            else:
                memory = scratch(pattern.shape, x)
                grad_values = gather(torch.mm(grad.t(), x, out=memory), pattern)
            grad_bias = grad.sum(0) if need_bias else None
            need_values = need_bias = False
        if need_x or need_values or need_bias:
            need = (need_x, need_values, need_bias)
            rest = products.gradients(grad, x, values.to(x.dtype), *where, need, below=True)
            grad_x, grad_values, grad_bias = (
                a if b is None else b for a, b in zip((grad_x, grad_values, grad_bias), rest, strict=True)
            )
        return grad_x, grad_values, grad_bias, None, None


# Function.apply without what it does for torch.func, which does not come here: 1 us.
_apply = super(torch.autograd.Function, _Planned).apply


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


def _along_mask(
    x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern, activation: str | None = None
) -> Tensor:
    """y, by the kernel that follows the mask."""
    code = ACTIVATION_CODES[activation]
    y: Tensor = mask.linear(
        x, values.to(x.dtype).contiguous(), bias, *mask_operands(pattern), activation=code
    )
    return y

"""The products of all formats as torch ops: schemas, gradients of any order, what ``torch.compile`` needs.

``y = x Wᵀ + b`` with ``W [out, in]`` given by ``values`` at the positions of a pattern. For each format the
ops

    ``<format>_linear(x, values, bias, pattern, sizes, activation) -> y``        y  = σ(x Wᵀ + b)
    ``<format>_linear_backward_input(grad, values, pattern, sizes) -> grad_x``   dx = g W
    ``<format>_linear_backward_weight(grad, x, pattern, sizes) -> grad_values``  dW = gᵀ x, where W has values
    ``<format>_linear_backward(grad, x, values, pattern, sizes, need...)``       dx, dW and db = Σ g at once

are closed under differentiation, but for an activation σ, which is for inference, and so are

    ``<format>_scatter(values, pattern, sizes) -> dense``                        W, with its zeros
    ``<format>_gather(dense, pattern, sizes) -> values``                         its values again

They take ``pattern`` and ``sizes`` as :meth:`Pattern.tensors` and :meth:`Pattern.sizes` give them. The
kernels register under these schemas in ``csrc/torch``.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._library import define
from .pattern import Pattern

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda y: y,
    "relu": torch.nn.functional.relu,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
}
"""What may follow a product, in the order of ``sk_activation`` in ``csrc/include/sparsekern/common.h``."""

ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}


PATTERN = "Tensor[] pattern, int[] sizes"
SCHEMAS = {
    "linear": f"(Tensor x, Tensor values, Tensor? bias, {PATTERN}, *, int activation=0) -> Tensor",
    "linear_backward": f"(Tensor grad, Tensor x, Tensor values, {PATTERN}, bool need_x, bool need_values, "
    "bool need_bias) -> (Tensor, Tensor, Tensor)",
    "linear_backward_input": f"(Tensor grad, Tensor values, {PATTERN}) -> Tensor",
    "linear_backward_weight": f"(Tensor grad, Tensor x, {PATTERN}) -> Tensor",
    "scatter": f"(Tensor values, {PATTERN}) -> Tensor",
    "gather": f"(Tensor dense, {PATTERN}) -> Tensor",
}


class Products:
    """The ops of one format, called as fast as eager torch allows.

    Args:
        format: the stem, e.g. ``"csr"``.
        values_shape: the shape of the values, from the pattern's tensors and sizes.
        library: the namespace of the ops, which must be defined: those of :data:`SCHEMAS` or the products
            among them.
    """

    def __init__(
        self,
        format: str,
        values_shape: Callable[[list[Tensor], list[int]], tuple[int, ...]],
        library: str = "sparsekern",
    ) -> None:
        self.format = format
        self.values_shape = values_shape
        self.library = library
        ops = getattr(torch.ops, library)
        # Looked up once: they are on the path of every call.
        self.forward: Callable[..., Any] = getattr(ops, f"{format}_linear").default
        self.backward: Callable[..., Any] = getattr(ops, f"{format}_linear_backward").default
        self.backward_input: Callable[..., Any] = getattr(ops, f"{format}_linear_backward_input").default
        self.backward_weight: Callable[..., Any] = getattr(ops, f"{format}_linear_backward_weight").default
        # Of any device; a library of products alone takes them from here.
        self.scatter: Callable[..., Any] = getattr(torch.ops.sparsekern, f"{format}_scatter").default
        self.gather: Callable[..., Any] = getattr(torch.ops.sparsekern, f"{format}_gather").default
        gradients: tuple[tuple[str, Callable[..., Any], Callable[..., None], Callable[..., Any]], ...] = (
            ("linear", self._linear_backward, _setup_linear, self._empty_linear),
            ("linear_backward", self._backward_backward, _setup_backward, self._empty_backward),
            ("linear_backward_input", self._input_backward, _setup_two, self._empty_input),
            ("linear_backward_weight", self._weight_backward, _setup_two, self._empty_weight),
            ("scatter", self._scatter_backward, _setup_one, self._empty_scatter),
            ("gather", self._gather_backward, _setup_one, self._empty_gather),
        )
        for name, backward, setup, empty in gradients if library == "sparsekern" else gradients[:4]:
            op = f"{library}::{format}_{name}"
            torch.library.register_autograd(op, backward, setup_context=setup)
            torch.library.register_fake(op, empty)

    def operands(self, pattern: Pattern) -> tuple[list[Tensor], list[int]]:
        """A pattern as the ops take it."""
        if torch.compiler.is_compiling():
            return pattern.tensors(), pattern.sizes()
        return pattern.operands

    def linear(
        self, x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern, activation: str | None = None
    ) -> Tensor:
        """``y = σ(x Wᵀ + b)`` by this library's kernels, for a 2-D ``x [batch, in]``."""
        x = strided(x)
        compiling = torch.compiler.is_compiling()
        tensors, sizes = self.operands(pattern)
        grad = torch.is_grad_enabled()
        if activation is not None:
            if not (grad and any(t is not None and t.requires_grad for t in (x, values, bias))):
                with torch.no_grad(), _below(not compiling):
                    fused: Tensor = self.forward(
                        x, values, bias, tensors, sizes, activation=ACTIVATION_CODES[activation]
                    )
                return fused
            return ACTIVATIONS[activation](self.linear(x, values, bias, pattern))
        if compiling:
            y: Tensor = self.forward(x, values, bias, tensors, sizes)
            return y
        # The same op and gradients without torch.library's Python in between: 15 us per call instead of 55.
        if grad:
            y = _apply(self, x, values, bias, pattern)  # type: ignore[no-untyped-call]
            return y
        with torch._C._AutoDispatchBelowAutograd():
            y = self.forward(x, values, bias, tensors, sizes)
            return y

    def gradients(
        self,
        grad: Tensor,
        x: Tensor,
        values: Tensor,
        pattern: list[Tensor],
        sizes: list[int],
        need: tuple[bool, ...],
        below: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """Those of x, values and bias that are needed; ``below`` autograd where theirs are not."""
        grad = strided(grad)
        with _below(below):
            all_three = self.backward(grad, x, values, pattern, sizes, *need)
        return tuple(g if needed else None for g, needed in zip(all_three, need, strict=True))

    def _linear_backward(self, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, values = ctx.saved_tensors
        found = self.gradients(grad, x, values, ctx.pattern, ctx.sizes, ctx.needs_input_grad[:3])
        return (*found, *_no_gradients(ctx))

    # Second derivatives, by the same ops. With dx = g W, dW = gᵀ x and db = Σ g, and their gradients u, V, w:
    #   d(g) = u Wᵀ + x Vᵀ + w,   d(x) = g V,   d(W) = gᵀ u

    def _backward_backward(self, ctx: Any, u: Tensor, v: Tensor, w: Tensor) -> tuple[Any, ...]:
        grad, x, values = ctx.saved_tensors
        need_x, need_values, need_bias = ctx.need
        where = ctx.pattern, ctx.sizes
        d_grad: Tensor | None = None
        if ctx.needs_input_grad[0]:
            terms = [self.forward(strided(u), values, None, *where)] if need_x else []
            terms += [self.forward(x, v.contiguous(), None, *where)] if need_values else []
            terms += [w.expand_as(grad)] if need_bias else []
            d_grad = sum(terms[1:], terms[0]) if terms else None
        d_x = d_values = None
        if need_values and ctx.needs_input_grad[1]:
            d_x = self.backward_input(grad, v.contiguous(), *where)
        if need_x and ctx.needs_input_grad[2]:
            d_values = self.backward_weight(grad, strided(u), *where)
        return d_grad, d_x, d_values, *_no_gradients(ctx), None, None, None

    def _input_backward(self, ctx: Any, u: Tensor) -> tuple[Any, ...]:
        grad, values = ctx.saved_tensors
        where = ctx.pattern, ctx.sizes
        u = strided(u)
        d_grad = self.forward(u, values, None, *where) if ctx.needs_input_grad[0] else None
        d_values = self.backward_weight(grad, u, *where) if ctx.needs_input_grad[1] else None
        return d_grad, d_values, *_no_gradients(ctx)

    def _weight_backward(self, ctx: Any, v: Tensor) -> tuple[Any, ...]:
        grad, x = ctx.saved_tensors
        where = ctx.pattern, ctx.sizes
        v = v.contiguous()
        d_grad = self.forward(x, v, None, *where) if ctx.needs_input_grad[0] else None
        d_x = self.backward_input(grad, v, *where) if ctx.needs_input_grad[1] else None
        return d_grad, d_x, *_no_gradients(ctx)

    # The two are each other's transpose.

    def _scatter_backward(self, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return self.gather(grad.contiguous(), ctx.pattern, ctx.sizes), *_no_gradients(ctx)

    def _gather_backward(self, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return self.scatter(grad.contiguous(), ctx.pattern, ctx.sizes), *_no_gradients(ctx)

    # What the ops return, for torch.compile. Layouts as in csrc/torch/common.h.

    def _empty_linear(
        self,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        pattern: list[Tensor],
        sizes: list[int],
        *,
        activation: int = 0,
    ) -> Tensor:
        self._one_device("linear", x, pattern)
        return _empty_matrix(x, sizes[0])

    def _empty_backward(
        self,
        grad: Tensor,
        x: Tensor,
        values: Tensor,
        pattern: list[Tensor],
        sizes: list[int],
        need_x: bool,
        need_values: bool,
        need_bias: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        self._one_device("linear_backward", grad, pattern)
        return (
            _empty_matrix(grad, sizes[1]) if need_x else grad.new_empty(0),
            grad.new_empty(self.values_shape(pattern, sizes) if need_values else 0),
            grad.new_empty(grad.shape[1] if need_bias else 0),
        )

    def _empty_input(self, grad: Tensor, values: Tensor, pattern: list[Tensor], sizes: list[int]) -> Tensor:
        self._one_device("linear_backward_input", grad, pattern)
        return _empty_matrix(grad, sizes[1])

    def _empty_weight(self, grad: Tensor, x: Tensor, pattern: list[Tensor], sizes: list[int]) -> Tensor:
        self._one_device("linear_backward_weight", grad, pattern)
        return x.new_empty(self.values_shape(pattern, sizes))

    def _empty_scatter(self, values: Tensor, pattern: list[Tensor], sizes: list[int]) -> Tensor:
        self._one_device("scatter", values, pattern)
        return values.new_empty(sizes[:2])

    def _empty_gather(self, dense: Tensor, pattern: list[Tensor], sizes: list[int]) -> Tensor:
        self._one_device("gather", dense, pattern)
        return dense.new_empty(self.values_shape(pattern, sizes))

    def _one_device(self, op: str, x: Tensor, pattern: list[Tensor]) -> None:
        devices = {str(tensor.device) for tensor in pattern}
        if devices != {str(x.device)}:
            raise RuntimeError(
                f"{self.library}::{self.format}_{op}: pattern must be on {x.device}, got {sorted(devices)}"
            )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        products: Products,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        pattern: Pattern,
    ) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.products, ctx.operands = products, products.operands(pattern)
        with torch._C._AutoDispatchBelowAutograd():
            y: Tensor = products.forward(x, values, bias, *ctx.operands)
            return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need, below = ctx.needs_input_grad[1:4], not torch.is_grad_enabled()
        return (None, *ctx.products.gradients(grad, *ctx.saved_tensors, *ctx.operands, need, below), None)


# Function.apply without what it does for torch.func, which does not come here: 1 us.
_apply = super(torch.autograd.Function, _Linear).apply


def _setup_linear(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    x, values, _, ctx.pattern, ctx.sizes = inputs
    if keyword_only_inputs["activation"]:
        raise RuntimeError("activation must be 0 where gradients are asked for, got one that is fused")
    ctx.save_for_backward(x, values)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, x, values, ctx.pattern, ctx.sizes, *ctx.need = inputs
    ctx.save_for_backward(grad, x, values)


def _setup_two(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, other, ctx.pattern, ctx.sizes = inputs
    ctx.save_for_backward(grad, other)


def _setup_one(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.pattern, ctx.sizes = inputs


def _no_gradients(ctx: Any) -> tuple[list[None], None]:
    """Of the lists ``pattern`` and ``sizes``, as torch.library wants them."""
    return [None] * len(ctx.pattern), None


def _below(below: bool) -> contextlib.AbstractContextManager[Any]:
    """Below autograd, where no gradients are asked for."""
    return torch._C._AutoDispatchBelowAutograd() if below else contextlib.nullcontext()


def strided(matrix: Tensor) -> Tensor:
    """``matrix`` itself where a kernel can read it (one stride is 1), else a contiguous copy."""
    batch, features = matrix.shape
    s0, s1 = matrix.stride()
    if (s1 == 1 and s0 >= features) or (s0 == 1 and s1 >= batch):
        return matrix
    return matrix.contiguous()


def _empty_matrix(like: Tensor, features: int) -> Tensor:
    """``[batch, features]`` in the layout of ``like``.

    Feature-major (strides ``(1, batch)``) in, feature-major out.
    """
    batch = like.shape[0]
    if like.stride(0) == 1 and like.stride(1) != 1:
        return like.new_empty((features, batch)).t()
    return like.new_empty((batch, features))


VALUES_SHAPE: dict[str, Callable[[list[Tensor], list[int]], tuple[int, ...]]] = {
    "csr": lambda pattern, sizes: tuple(pattern[1].shape),
    "bsr": lambda pattern, sizes: (pattern[1].shape[0], sizes[2], sizes[3]),
    "nm": lambda pattern, sizes: tuple(pattern[0].shape),
    "vnm": lambda pattern, sizes: tuple(pattern[1].shape),
}
"""The shape of each format's values, from its pattern's tensors and sizes."""

for _format, _name in itertools.product(VALUES_SHAPE, SCHEMAS):
    define(f"{_format}_{_name}{SCHEMAS[_name]}")

PRODUCTS = {format: Products(format, values_shape) for format, values_shape in VALUES_SHAPE.items()}
"""The native products of each format by its stem."""

"""The products in Triton, as ops of ``torch.ops.sparsekern_triton``, and why there are none where so.

Triton is imported when it is first needed: a torch for CPUs comes without. ``torch.compile`` sees through the
ops, to the kernels. Under the interpreter, for tests, they are opaque.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from .. import triton_profile
from .._triton import unusable
from .pattern import Pattern
from .products import VALUES_SHAPE, Products

LIBRARY = "sparsekern_triton"
FORMATS = ("bsr", "csr", "nm", "vnm")
"""Those that have Triton kernels."""

_PRODUCTS: dict[str, TritonProducts] = {}


class TritonProducts(Products):
    """The ops of one format in Triton."""

    def operands(self, pattern: Pattern) -> tuple[list[Tensor], list[int]]:
        """A pattern as on a GPU."""
        if torch.compiler.is_compiling():
            return pattern.gpu_tensors(), pattern.sizes()
        return pattern.gpu_operands


def products(format: str) -> TritonProducts:
    """The ops of a format that :func:`missing` says nothing of."""
    return _PRODUCTS[format]


# Called while torch.compile traces, which must not follow it into imports and registrations.
@torch.compiler.assume_constant_result
def missing(format: str, kind: str) -> str | None:
    """Why Triton's kernels of ``format`` cannot run on tensors of a device type, or None if they can."""
    return _missing(format, kind)


@functools.cache
def _missing(format: str, kind: str) -> str | None:
    if (reason := unusable(kind)) is not None:
        return reason
    if format not in FORMATS:
        return f"there are Triton kernels for {', '.join(FORMATS)}, not for {format}"
    if kind == "cuda":
        _load_profile()
    if format not in _PRODUCTS:
        kernels: Any = importlib.import_module("..triton_kernels.common", __package__)
        _PRODUCTS[format] = _register(format, kernels.INTERPRETED)
    return None


@functools.cache
def _load_profile() -> None:
    triton_profile.load(triton_profile.profile_path())


def _register(format: str, interpreted: bool) -> TritonProducts:
    kernels: Any = importlib.import_module(f"..triton_kernels.{format}", __package__)
    # A traced call of an interpreted kernel would find tensors without numbers.
    define: Any = torch.library.custom_op if interpreted else torch.library.triton_op

    # By these names torch finds the kernels below, for the keys of what it compiled.
    backward_input, backward_weight = kernels.linear_backward_input, kernels.linear_backward_weight

    def linear_backward(
        grad: Tensor,
        x: Tensor,
        values: Tensor,
        pattern: list[Tensor],
        sizes: list[int],
        need_x: bool,
        need_values: bool,
        need_bias: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        nothing = grad.new_empty
        return (
            backward_input(grad, values, pattern, sizes) if need_x else nothing(0),
            backward_weight(grad, x, pattern, sizes) if need_values else nothing(0),
            grad.sum(0, dtype=grad.dtype) if need_bias else nothing(0),
        )

    for name, function in (
        ("linear", kernels.linear),
        ("linear_backward", linear_backward),
        ("linear_backward_input", backward_input),
        ("linear_backward_weight", backward_weight),
    ):
        define(f"{LIBRARY}::{format}_{name}", function, mutates_args=())
    return TritonProducts(format, VALUES_SHAPE[format], LIBRARY)

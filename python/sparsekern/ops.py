"""The functional API, and the choice of the backend that runs it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._library import LOAD_ERROR, has_kernel
from .formats import CSR, Pattern
from .formats.csr import csr_linear

BACKENDS = ("auto", "native", "reference")
NATIVE_DTYPES = (torch.float32, torch.bfloat16)

_NATIVE: dict[type[Pattern], Callable[[Tensor, Tensor, Tensor | None, Pattern], Tensor]] = {CSR: csr_linear}


def linear(
    x: Tensor, values: Tensor, pattern: Pattern, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """``y = x Wᵀ + b`` where the sparse ``W [out, in]`` holds ``values`` at the positions of ``pattern``.

    Args:
        x: ``(..., in_features)``. A feature-major x (2-D, strides ``(1, batch)``) gives a feature-major y,
            with no transpose.
        values: the nonzeros, of shape ``pattern.values_shape`` and x's dtype.
        pattern: where the nonzeros are, on x's device.
        bias: ``[out_features]`` or None.
        backend: ``"native"`` (compiled kernels; float32 and bfloat16, accumulated in float32),
            ``"reference"`` (scatter to a dense weight and ``torch.nn.functional.linear``; any dtype and
            device) or ``"auto"`` (native where it can run).

    Returns:
        ``(..., out_features)``, of x's dtype. Differentiable in x, values and bias, any number of times.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or a backend that cannot run this call.
    """
    out_features, in_features = pattern.shape
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x must have shape (..., {in_features}), got {tuple(x.shape)}")
    if pattern.device != x.device:
        raise ValueError(f"pattern must be on {x.device} as x is, got one on {pattern.device}")
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        x, values, bias = _autocast(x, values, bias)
    if not x.is_floating_point():
        raise ValueError(f"x must be of a float dtype, got {x.dtype}")
    _check_like("values", values, x, pattern.values_shape)
    if bias is not None:
        _check_like("bias", bias, x, (out_features,))
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    reason = None if backend == "reference" else unavailable(x, pattern)
    if backend == "native" and reason is not None:
        raise ValueError(f'backend="native" cannot run: {reason}')
    if backend == "reference" or reason is not None:
        return torch.nn.functional.linear(x, pattern.scatter(values), bias)
    native = _NATIVE[type(pattern)]
    if x.dim() == 2:
        return native(x, values, bias, pattern)
    batch = x.reshape(math.prod(x.shape[:-1]), in_features)
    return native(batch, values, bias, pattern).view(*x.shape[:-1], out_features)


def _autocast(x: Tensor, values: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as autocast does for a dense layer: floating-point tensors but float64."""
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

    return cast(x), cast(values), None if bias is None else cast(bias)


def _check_like(name: str, tensor: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape or tensor.dtype != x.dtype or tensor.device != x.device:
        raise ValueError(
            f"{name} must be {x.dtype} {list(shape)} on {x.device}, "
            f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        )


def unavailable(x: Tensor, pattern: Pattern) -> str | None:
    """Why the native kernels cannot run on x, or None if they can."""
    if x.dtype not in NATIVE_DTYPES:
        return f"it takes {' or '.join(str(d) for d in NATIVE_DTYPES)}, got {x.dtype}"
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "torch.func transforms and forward-mode derivatives need ops made of torch's own"
    kind = x.device.type
    if kind in ("cpu", "meta"):
        return LOAD_ERROR
    if not has_kernel(f"{pattern.format}_linear", kind):
        return LOAD_ERROR or f"the library was built without {kind} kernels"
    if torch.is_grad_enabled() and not has_kernel(f"{pattern.format}_linear_backward_input", kind):
        return f"it has no backward kernels for {kind} yet; wrap inference in torch.no_grad()"
    return None

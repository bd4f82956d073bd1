"""The functional API, and the choice of the backend that runs it."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import cost, cost_gpu, cost_triton
from ._library import LOAD_ERROR, has_kernel
from .copies import Ready, capturing
from .dense import DENSE, NATIVE, By, Plan, planned_linear, scattered_linear
from .formats import Pattern
from .formats import triton_products as triton
from .formats.products import ACTIVATIONS, PRODUCTS

BACKENDS = ("auto", "native", "triton", "dense", "reference")
NATIVE_DTYPES = (torch.float32, torch.bfloat16)
GPU_DTYPES = (*NATIVE_DTYPES, torch.float16)
SCATTER_DTYPES = (*NATIVE_DTYPES, torch.float16, torch.float64)

TRANSFORMED = "torch.func transforms and forward-mode derivatives need ops made of torch's own"

CHECK = os.environ.get("SPARSEKERN_CHECK", "0") not in ("", "0")
"""Whether every call checks its pattern's contents again, to find who writes to index tensors. Slow."""


def linear(
    x: Tensor,
    values: Tensor,
    pattern: Pattern,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """``y = σ(x Wᵀ + b)`` where the sparse ``W [out, in]`` holds ``values`` at the positions of ``pattern``.

    Args:
        x: ``(..., in_features)``. A feature-major x (2-D, strides ``(1, batch)``) gives a feature-major y,
            with no transpose.
        values: the nonzeros, of shape ``pattern.values_shape`` and x's dtype.
        pattern: where the nonzeros are, on x's device.
        bias: ``[out_features]`` or None.
        activation: σ, ``"relu"``, ``"gelu"`` (exact), ``"silu"`` or None. The native kernels apply it as they
            store y, where no gradient is asked for.
        backend: ``"native"`` (compiled kernels; float32 and bfloat16, on GPUs float16, accumulated in
            float32), ``"triton"`` (kernels that are compiled when they first run, on GPUs; the same dtypes),
            ``"dense"`` (torch's product with a dense copy of W, kept while the values do not
            change; any dtype and device), ``"reference"`` (the same in plain torch operations, with nothing
            kept) or ``"auto"``: native, on a GPU that the library has no kernels for Triton, where it can run
            and is predicted to be faster than dense, see :mod:`sparsekern.cost`.

    Returns:
        ``(..., out_features)``, of x's dtype. Differentiable in x, values and bias, any number of times.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or a backend that cannot run this call.
    """
    if activation is None and not (torch.compiler.is_compiling() or torch.is_grad_enabled()):
        ready: Ready | None = pattern.memo.get(("ready", backend))
        if ready is not None and ready.serves(x, values, bias, pattern) and not (CHECK or _transformed()):
            return torch.nn.functional.linear(x, ready.weight, bias)
    out_features, in_features = pattern.shape
    device = x.device  # once: 0.1 us each time
    kind = device.type
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x must have shape (..., {in_features}), got {tuple(x.shape)}")
    if pattern.device != device:
        raise ValueError(f"pattern must be on {device} as x is, got one on {pattern.device}")
    if CHECK and kind != "meta" and not torch.compiler.is_compiling():
        pattern.check()
    dtype = values.dtype
    if kind != "meta" and torch.is_autocast_enabled(kind):
        x, bias, dtype = _autocast(x, bias, dtype)
    if not x.is_floating_point():
        raise ValueError(f"x must be of a float dtype, got {x.dtype}")
    _check_like("values", values, pattern.values_shape, x.dtype, device, dtype)
    if bias is not None:
        _check_like("bias", bias, (out_features,), x.dtype, device, bias.dtype)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {list(ACTIVATIONS)}, got {activation!r}")
    if backend == "reference":
        weight = pattern.scatter(values.to(dtype))
        return ACTIVATIONS[activation](torch.nn.functional.linear(x, weight, bias))
    reason = unavailable(dtype, kind, pattern)
    if backend == "native" and reason is not None:
        raise ValueError(f'backend="native" cannot run: {reason}')
    in_triton = backend == "triton" or (backend == "auto" and kind == "cuda" and reason is not None)
    if in_triton and (missing := unavailable_in_triton(dtype, kind, pattern)) is not None:
        if backend == "triton":
            raise ValueError(f'backend="triton" cannot run: {missing}')
        in_triton = False
    if reason is not None and not in_triton:
        return ACTIVATIONS[activation](_dense(x, values.to(dtype), bias, pattern))
    flat = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), in_features)
    if in_triton:
        if backend == "auto" and not prefers_triton(flat, values, pattern):
            return ACTIVATIONS[activation](_dense(x, values.to(dtype), bias, pattern))
        y = triton.products(pattern.format).linear(flat, values.to(dtype), bias, pattern, activation)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], out_features)
    plan = DENSE if backend == "dense" else NATIVE if backend == "native" else choose(flat, values, pattern)
    if backend == "auto" and kind == "cuda" and measured_in_triton(flat, values, pattern, plan):
        y = triton.products(pattern.format).linear(flat, values.to(dtype), bias, pattern, activation)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], out_features)
    if plan == NATIVE:
        y = PRODUCTS[pattern.format].linear(flat, values.to(dtype), bias, pattern, activation)
    elif torch.compiler.is_compiling():
        y = ACTIVATIONS[activation](scattered_linear(flat, values.to(dtype), bias, pattern))
    else:  # casts the copy of the values that it keeps
        y = planned_linear(flat, values, bias, pattern, plan, activation)
        if plan.forward is By.DENSE and kind == "cpu" and not torch.is_grad_enabled():
            Ready.remember(backend, x, values, bias, pattern)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], out_features)


def choose(x: Tensor, values: Tensor, pattern: Pattern) -> Plan:
    """What ``"auto"`` does in this call, for a 2-D x that the native kernels take."""
    kind = x.device.type
    if kind not in ("cpu", "cuda"):
        return NATIVE
    if torch.compiler.is_compiling():
        if kind == "cuda":
            native = cost_gpu.native_if_compiled(pattern, x.shape[0] <= cost.FEW, x.dtype)
        else:
            native = cost.native_if_compiled(pattern, x.dtype)
        return NATIVE if native else DENSE
    grad = torch.is_grad_enabled()
    call = (pattern, x.shape[0], x.dtype, grad and x.requires_grad, grad and values.requires_grad)
    return cost.choose(*call) if kind == "cpu" else cost_gpu.choose(*call, keeps=not capturing(x))


def prefers_triton(x: Tensor, values: Tensor, pattern: Pattern) -> bool:
    """Whether ``"auto"`` runs Triton's kernels and not torch's dense product, without native ones."""
    if torch.compiler.is_compiling():
        return cost_triton.beats_dense_if_compiled(pattern, x.shape[0] <= cost.FEW, x.dtype)
    grad = torch.is_grad_enabled()
    need = grad and x.requires_grad, grad and values.requires_grad
    return cost_triton.beats_dense(pattern, x.shape[0], x.dtype, *need)


def measured_in_triton(x: Tensor, values: Tensor, pattern: Pattern, plan: Plan) -> bool:
    """Whether ``"auto"`` runs Triton's kernels and not ``plan``, as ``tune`` measured them on this GPU."""
    if torch.compiler.is_compiling() or triton.missing(pattern.format, x.device.type) is not None:
        return False
    grad = torch.is_grad_enabled()
    need = grad and x.requires_grad, grad and values.requires_grad
    return cost_triton.beats_native(pattern, x.shape[0], x.dtype, *need, plan)


def _dense(x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern) -> Tensor:
    """The dense product where the native kernels cannot run: the library may still scatter."""
    plain = (
        x.device.type != "cpu" or LOAD_ERROR is not None or x.dtype not in SCATTER_DTYPES or _transformed()
    )
    if plain:
        return torch.nn.functional.linear(x, pattern.scatter(values), bias)
    return scattered_linear(x, values, bias, pattern)


def _transformed() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _autocast(
    x: Tensor, bias: Tensor | None, values: torch.dtype
) -> tuple[Tensor, Tensor | None, torch.dtype]:
    """As autocast casts for a dense layer, floating-point tensors but float64; and the values' new dtype."""
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

    keeps = values == torch.float64 or not values.is_floating_point
    return cast(x), None if bias is None else cast(bias), values if keeps else dtype


def _check_like(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    got: torch.dtype,
) -> None:
    if tensor.shape != shape or got != dtype or tensor.device != device:
        raise ValueError(
            f"{name} must be {dtype} {list(shape)} on {device}, "
            f"got {got} {list(tensor.shape)} on {tensor.device}"
        )


def unavailable(dtype: torch.dtype, kind: str, pattern: Pattern) -> str | None:
    """Why the native kernels cannot run on an x of this dtype and device type, or None if they can."""
    dtypes = GPU_DTYPES if kind == "cuda" else NATIVE_DTYPES
    if dtype not in dtypes:
        return f"it takes {' or '.join(str(d) for d in dtypes)}, got {dtype}"
    if _transformed():
        return TRANSFORMED
    if kind in ("cpu", "meta"):
        return LOAD_ERROR
    if not has_kernel(f"{pattern.format}_linear", kind):
        return LOAD_ERROR or f"the library was built without {kind} kernels"
    if torch.is_grad_enabled() and not has_kernel(f"{pattern.format}_linear_backward_input", kind):
        return f"it has no backward kernels for {kind} yet; wrap inference in torch.no_grad()"
    return None


def unavailable_in_triton(dtype: torch.dtype, kind: str, pattern: Pattern) -> str | None:
    """:func:`unavailable` of Triton's kernels."""
    if dtype not in GPU_DTYPES:
        return f"it takes {' or '.join(str(d) for d in GPU_DTYPES)}, got {dtype}"
    if _transformed():
        return TRANSFORMED
    missing: str | None = triton.missing(pattern.format, kind)
    return missing

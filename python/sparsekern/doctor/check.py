"""One case: whether its op can run, and how far its results are from those in float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .._library import LOAD_ERROR, has_kernel
from ..copies import mask_fits, mask_operands
from ..formats import NM, Pattern, parse_format
from ..formats import triton_products as triton
from ..formats.products import ACTIVATIONS
from ..tolerance import Exact, as_tuple
from .cases import LAYOUTS, MASKED, PATTERN, TRITON, Case

OLDEST = (8, 0)
"""Compute capability that the GPU kernels need: tensor cores with bfloat16 and asynchronous copies."""


def check(case: Case) -> float:
    """The largest error of the case's op in units of what rounding explains: it is right up to 1.

    What must be exact (patterns, scatter and gather, the same bits twice) is 0, or infinite where it is not.
    """
    inputs = _inputs(case.format, case.shape, case.batch, case.density, case.dtype, case.seed)
    return _CHECKS[case.product](case, inputs)


def no_device(device: str) -> str | None:
    """Why no native kernel runs on ``device``, or None."""
    if LOAD_ERROR is not None:
        return LOAD_ERROR
    at = torch.device(device)
    if at.type == "cpu":
        return None
    if at.type != "cuda":
        return f"there are kernels for cpu and cuda, none for {at.type}"
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no GPU that it can use"
    if (at.index or 0) >= torch.cuda.device_count():
        return f"torch finds {torch.cuda.device_count()} GPUs, numbered from 0"
    capability = torch.cuda.get_device_capability(at)
    if capability < OLDEST:
        needs = ".".join(map(str, OLDEST))
        return (
            f"its compute capability is {'.'.join(map(str, capability))}, the kernels need {needs} or later"
        )
    if not has_kernel("csr_linear", "cuda"):
        return "the library was built without CUDA"
    return None


def no_triton(device: str) -> str | None:
    """Why no kernel in Triton runs on ``device``, or None."""
    at = torch.device(device)
    if at.type == "cuda" and (at.index or 0) >= torch.cuda.device_count():
        return no_device(device)
    return triton.missing(triton.FORMATS[0], at.type)  # type: ignore[no-any-return]


@functools.cache
def unavailable(device: str, format: str, product: str, dtype: torch.dtype) -> str | None:
    """Why this op is not there, or None if it must compute the right numbers."""
    if product in TRITON:
        with torch.no_grad():
            pattern = _pattern(format, (8, 32), 1.0, 0)[1]
            return no_triton(device) or ops.unavailable_in_triton(dtype, torch.device(device).type, pattern)
    if reason := no_device(device):
        return reason
    kind = torch.device(device).type
    if product == PATTERN:
        return None
    pattern = _pattern(format, (8, 32), 1.0, 0)[1]
    op = product if product in MASKED else f"{pattern.format}_{product}"
    if not has_kernel(op, kind):
        return f"the library has no {kind} kernel of {op}"
    if product in MASKED and kind == "cuda" and dtype == torch.float32:
        return "products along a mask take torch.bfloat16 or torch.float16 there"
    if product in MASKED and kind == "cuda" and not mask_fits(torch.device(device)):
        return "products along a mask take 110 KB of shared memory for a block of threads"
    if product in ("scatter", "gather"):
        return None  # they move bytes, of any dtype here
    with torch.no_grad():
        return ops.unavailable(dtype, kind, pattern)


class _Inputs:
    """Random numbers on the CPU, and the pattern there, which is what the others are held against."""

    def __init__(
        self, scores: Tensor, pattern: Pattern, batch: int, dtype: torch.dtype, generator: torch.Generator
    ) -> None:
        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator).to(dtype)

        out_features, in_features = pattern.shape
        self.scores, self.pattern = scores, pattern
        self.x, self.grad = normal(batch, in_features), normal(batch, out_features)
        self.values, self.bias = pattern.zero_padding_(normal(*pattern.values_shape)), normal(out_features)
        self.dense = normal(out_features, in_features)


@functools.lru_cache(maxsize=1)  # the ops of a weight come one after the other
def _inputs(
    format: str, shape: tuple[int, int], batch: int, density: float, dtype: torch.dtype, seed: int
) -> _Inputs:
    scores, pattern = _pattern(format, shape, density, seed)
    return _Inputs(scores, pattern, batch, dtype, torch.Generator().manual_seed(seed + 1))


def _pattern(format: str, shape: tuple[int, int], density: float, seed: int) -> tuple[Tensor, Pattern]:
    """Scores and the pattern of the best. Some rows hold much more than others, some nothing at all."""
    scores = torch.rand(shape, generator=(generator := torch.Generator().manual_seed(seed)))
    scores *= torch.rand((shape[0], 1), generator=generator).square()
    kind = parse_format(format)
    if kind.fixed_sparsity is None and density == 0.0:
        return scores, kind.from_mask(torch.zeros(shape, dtype=torch.bool))
    sparsity = 1.0 - density if kind.fixed_sparsity is None else None
    both_ways = format == "2:4" and not any(size % 4 for size in shape)  # GPUs have a kernel for that
    return scores, kind.from_mask(kind.prune(scores, sparsity, both_ways))


@functools.lru_cache(maxsize=1)
def _on(device: str, format: str, inputs: _Inputs) -> Pattern:
    """The pattern, built on this device as a user does."""
    return parse_format(format).from_mask(inputs.pattern.to_mask().to(device))


def _run(
    case: Case,
    inputs: _Inputs,
    exact: Exact,
    *arguments: Tensor | None,
    need: tuple[bool, ...] = (),
    activation: str | None = None,
) -> float:
    """The error of the case's op, called twice: the results must be the same bits."""

    def place(argument: Tensor | None) -> Tensor | None:
        if argument is None:
            return None
        strided = argument is inputs.x or argument is inputs.grad
        moved = argument.to(case.device)
        return LAYOUTS[case.layout](moved) if strided else moved

    pattern = _on(case.device, case.format, inputs)
    operands: Any = mask_operands(pattern) if case.product in MASKED else pattern.operands
    if case.product in TRITON:
        operands = pattern.gpu_operands
    placed = [place(argument) for argument in arguments]
    options = {} if activation is None else {"activation": list(ACTIVATIONS).index(activation)}
    first, second = (as_tuple(_op(case)(*placed, *operands, *need, **options)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        if not torch.equal(a.nan_to_num(nan=math.pi), b.nan_to_num(nan=math.pi)):
            raise RuntimeError("the same call must give the same bits twice, got others")
    return exact.worst(first)


def _op(case: Case) -> Callable[..., Any]:
    triton_op = case.product in TRITON
    library = torch.ops.sparsekern_triton if triton_op else torch.ops.sparsekern
    op: Callable[..., Any] = getattr(library, case.kernel.replace("triton_", ""))
    return op


def _linear(case: Case, inputs: _Inputs) -> float:
    scatter, x, values, bias = inputs.pattern.scatter, inputs.x, inputs.values, inputs.bias
    plain = Exact(lambda x, v: x @ scatter(v).t(), x, values)
    shifted = Exact(lambda x, v, b: x @ scatter(v).t() + b, x, values, bias)
    errors = [_run(case, inputs, plain, x, values, None), _run(case, inputs, shifted, x, values, bias)]
    for name, activation in ACTIVATIONS.items():
        if name is not None:
            exact = shifted.activated(activation)
            errors.append(_run(case, inputs, exact, x, values, bias, activation=name))
    return max(errors)


def _backward_input(case: Case, inputs: _Inputs) -> float:
    exact = Exact(lambda g, v: g @ inputs.pattern.scatter(v), inputs.grad, inputs.values)
    return _run(case, inputs, exact, inputs.grad, inputs.values)


def _backward_weight(case: Case, inputs: _Inputs) -> float:
    exact = Exact(lambda g, x: inputs.pattern.gather(g.t() @ x), inputs.grad, inputs.x)
    return _run(case, inputs, exact, inputs.grad, inputs.x)


def _backward(case: Case, inputs: _Inputs) -> float:
    def all_three(g: Tensor, x: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return g @ inputs.pattern.scatter(v), inputs.pattern.gather(g.t() @ x), g.sum(0)

    arguments = inputs.grad, inputs.x, inputs.values
    return _run(case, inputs, Exact(all_three, *arguments), *arguments, need=(True, True, True))


def _mask_backward(case: Case, inputs: _Inputs) -> float:
    need_x = torch.device(case.device).type == "cpu"  # a GPU has no kernel for that

    def all_three(g: Tensor, x: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        grad_x = g @ inputs.pattern.scatter(v) if need_x else g.new_empty(0)
        return grad_x, inputs.pattern.gather(g.t() @ x).flatten(), g.sum(0)

    exact = Exact(all_three, inputs.grad, inputs.x, inputs.values)
    return _run(case, inputs, exact, inputs.grad, inputs.x, inputs.values, need=(need_x, True))


def _scatter(case: Case, inputs: _Inputs) -> float:
    operands = _on(case.device, case.format, inputs).operands
    got = _op(case)(inputs.values.to(case.device), *operands)
    return _equal(got, inputs.pattern.scatter(inputs.values))


def _gather(case: Case, inputs: _Inputs) -> float:
    operands = _on(case.device, case.format, inputs).operands
    got = _op(case)(inputs.dense.to(case.device), *operands)
    return _equal(got, inputs.pattern.gather(inputs.dense))


def _check_pattern(case: Case, inputs: _Inputs) -> float:
    """Built on the device from its mask, and from scores: sums of these may be rounded otherwise there."""
    kind, built = parse_format(case.format), _on(case.device, case.format, inputs)
    for (name, got), (_, expected) in zip(built.state(), inputs.pattern.state(), strict=True):
        if not torch.equal(got.cpu(), expected):
            raise RuntimeError(f"{name} must be what it is on the CPU, got other positions")
    moved = inputs.pattern.to(case.device)
    for got, expected in zip(built.operands[0], moved.operands[0], strict=True):
        if not torch.equal(got.cpu(), expected.cpu()):
            raise RuntimeError("a pattern that is moved must equal one that is built there, got another")
    sparsity = 1.0 - case.density if kind.fixed_sparsity is None else None
    if sparsity is not None and case.density == 0.0:
        return 0.0
    fits = kind.kind is NM and not any(size % kind.options["m"] for size in case.shape)
    for transposable in (False, True) if fits else (False,):
        mask = kind.prune(inputs.scores.to(case.device), sparsity, transposable).cpu()
        kind.from_mask(mask)  # refuses what is not of the format
        if transposable:
            kind.from_mask(mask.t())
        best = kind.prune(inputs.scores, sparsity, transposable)
        kept, at_best = (float(inputs.scores.double()[m].sum()) for m in (mask, best))
        if abs(kept - at_best) > 1e-4 * at_best:
            raise RuntimeError(f"prune must keep {at_best:.6g} of the scores as on the CPU, got {kept:.6g}")
    return 0.0


def _equal(got: Tensor, expected: Tensor) -> float:
    return 0.0 if got.dtype == expected.dtype and torch.equal(got.cpu(), expected) else math.inf


_CHECKS: dict[str, Callable[[Case, _Inputs], float]] = {
    PATTERN: _check_pattern,
    "linear": _linear,
    "linear_backward_input": _backward_input,
    "linear_backward_weight": _backward_weight,
    "linear_backward": _backward,
    "scatter": _scatter,
    "gather": _gather,
    "mask_linear": _linear,
    "mask_linear_backward": _mask_backward,
    **dict(zip(TRITON, (_linear, _backward_input, _backward_weight, _backward), strict=True)),
}

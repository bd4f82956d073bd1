"""What the kernels share: tiles and how they are chosen, the end of a product, the layout of results."""

from __future__ import annotations

import functools
import heapq
from collections.abc import Callable, Iterable
from typing import Any, Concatenate, NamedTuple, ParamSpec

import torch
import triton
import triton.language as tl
from torch import Tensor

P = ParamSpec("P")

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether ``TRITON_INTERPRET=1`` was set when Triton was imported: kernels then run on the CPU, slowly."""

# torch 2.11's refuses interpreted kernels, which need no wrapping.
wrap_triton: Callable[..., Any] = (lambda kernel: kernel) if INTERPRETED else torch.library.wrap_triton


def on_device(function: Callable[Concatenate[Tensor, P], Tensor]) -> Callable[Concatenate[Tensor, P], Tensor]:
    """What launches kernels, on the GPU of its first argument: Triton launches on the current one."""

    @functools.wraps(function)
    def launching(first: Tensor, /, *rest: P.args, **options: P.kwargs) -> Tensor:
        if not first.is_cuda:
            return function(first, *rest, **options)
        with torch.cuda.device(first.device):
            return function(first, *rest, **options)

    return launching


def check_contiguous(**tensors: Tensor | None) -> None:
    """Raise unless they are: the kernels read them number after number."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tuple(tensor.stride())}")


class Config(NamedTuple):
    """A tile of a result, and how a program goes over what it sums up.

    Attributes:
        rows: of the tile that W's side gives: features of y, or rows of W.
        columns: of the tile that x's side gives: rows of x, or columns of W.
        step: of the sum, at a time.
        warps: of a program.
        stages: steps under way at a time, in shared memory.
    """

    rows: int
    columns: int
    step: int
    warps: int
    stages: int

    def shared(self, itemsize: int) -> int:
        """Bytes of shared memory."""
        return self.stages * (self.rows + self.columns) * self.step * itemsize


class Gpu(NamedTuple):
    """What of a GPU decides which tiles serve it."""

    multiprocessors: int
    shared: int
    wgmma: bool


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU of ``device``. On a CPU, for the interpreter, one so small that programs have many tiles."""
    if device.type != "cuda":
        return Gpu(3, 163 << 10, False)
    found: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack what is asked for
    return Gpu(found.multi_processor_count, found.shared_memory_per_block_optin, found.major == 9)


def resident(config: Config, itemsize: int, gpu: Gpu) -> int:
    """Programs that a multiprocessor holds: by shared memory, of which each takes 1 KB more, and registers.

    A thread needs those of its part of the tile, and some 64.
    """
    registers = config.rows * config.columns + 64 * 32 * config.warps
    return max(1, min((gpu.shared + 1024) // (config.shared(itemsize) + 1024), (1 << 16) // registers, 8))


def cycles(config: Config, tiles: int, steps: float, dtype: torch.dtype, gpu: Gpu) -> float:
    """Of a product: whole waves of tiles, each bound by what it multiplies or by what it reads from L2.

    A multiprocessor reads some 32 bytes from L2 in a cycle, and multiplies 2048 pairs of 16 bits on Hopper,
    half as many before it and in TF32, 128 of float32. A step takes 100 cycles in any case, a tile 2000 more.
    """
    tensor = 2048 if gpu.wgmma else 1024
    multiplied = tensor if dtype != torch.float32 else 128 if precision() == "ieee" else tensor // 2
    computing = config.rows * config.columns * config.step / multiplied
    reading = (config.rows + config.columns) * config.step * dtype.itemsize / 32
    busy = -(-tiles // gpu.multiprocessors) * steps * max(computing, reading)
    at_once = gpu.multiprocessors * resident(config, dtype.itemsize, gpu)
    return busy + -(-tiles // at_once) * (2000 + 100 * steps)


TUNED: dict[str, Config] = {}
"""What was measured to be the best: :func:`key` to a config. ``python -m sparsekern tune`` measures."""

ASKED: dict[str, list[Config]] = {}
"""What was asked of :func:`choose` since :func:`forget`, and the configs that may be best, by rank."""

_MEASURED = 4  # per choice: `tune` compiles each, which takes a second


def choose(name: str, configs: Iterable[Config], cost: Callable[[Config], float]) -> Config:
    """The config that was measured to be the best, or that of the least cost."""
    candidates = list(configs)
    ASKED[name] = heapq.nsmallest(_MEASURED, candidates, key=cost)
    tuned = TUNED.get(name)
    return tuned if tuned in candidates else ASKED[name][0]


_CACHES: list[Any] = []


def remembered(function: Callable[P, Config]) -> Callable[P, Config]:
    """A function that chooses, with a cache until :func:`forget`."""
    cached = functools.cache(function)
    _CACHES.append(cached)
    return cached  # type: ignore[return-value]


def forget() -> None:
    """Choose anew."""
    ASKED.clear()
    for cache in _CACHES:
        cache.cache_clear()


def key(product: str, dtype: torch.dtype, *rest: object) -> str:
    """Names a choice, e.g. ``"bsr/bfloat16/ieee/128/4096"``."""
    return "/".join([product, str(dtype).removeprefix("torch."), *map(str, rest)])


def bucket(batch: int) -> int:
    """The largest batch that shares its choices with ``batch``.

    By comparisons alone: while torch.compile traces, ``batch`` may be a symbol, and each is a guard.
    """
    return next((end for end in (16, 32, 64, 128, 256, 512, 1024, 2048) if batch <= end), 4096)


def fitting(configs: Iterable[Config], itemsize: int, gpu: Gpu) -> list[Config]:
    """Those whose tiles fit in the GPU's shared memory."""
    return [config for config in configs if config.shared(itemsize) <= gpu.shared]


def precision() -> str:
    """Of float32 products: exact, unless torch's own may run in TF32."""
    try:
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    except RuntimeError:  # it was set for cuBLAS alone, by torch's newer names
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def empty_like(x: Tensor, features: int) -> Tensor:
    """``[batch, features]`` in the layout of ``x``: feature-major in, feature-major out."""
    batch = x.shape[0]
    if x.stride(0) == 1 and x.stride(1) != 1:
        return x.new_empty((features, batch)).t()
    return x.new_empty((batch, features))


def feature_major(x: Tensor) -> Tensor:
    """``x`` with rows along the batch; one row is one in any layout that has the stride of its features."""
    if x.stride(0) == 1 or x.shape[0] == 1:
        return x
    # Rows a multiple of 16 numbers apart: others Triton takes for unaligned, and reads number by number.
    copy = x.new_empty((x.shape[1], -(-x.shape[0] // 16) * 16))[:, : x.shape[0]]
    return copy.copy_(x.t()).t()


_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def outer_sum(lines, along, LINES_DOWN: tl.constexpr):
    """A tile of addresses: ``lines`` down and ``along`` across, or turned.

    Tiles are read as they are multiplied: what is turned later, Ampere does not read ahead.
    """
    if LINES_DOWN:
        tile = lines[:, None] + along[None, :]
    else:
        tile = lines[None, :] + along[:, None]
    return tile


@triton.jit
def outer_and(lines, along, LINES_DOWN: tl.constexpr):
    """A tile's mask, likewise."""
    if LINES_DOWN:
        tile = lines[:, None] & along[None, :]
    else:
        tile = lines[None, :] & along[:, None]
    return tile


@triton.jit
def dot(a, b, sums, PRECISION: tl.constexpr):
    """``sums + a b``, in float32."""
    if _INTERPRETED:  # where a dot takes bfloat16 for integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def rounded(y, dtype: tl.constexpr):
    """A float32 ``y`` as the nearest number of ``dtype``."""
    if _INTERPRETED and dtype == tl.bfloat16:  # where a cast cuts bits off
        bits = y.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        y = tl.where(y == y, nearest.to(tl.float32, bitcast=True), y)
    return y.to(dtype)


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """σ(y) in float32, by the codes of ``sk_activation``."""
    if ACTIVATION == 1:
        y = tl.where(y < 0, 0.0, y)  # NaN stays NaN
    elif ACTIVATION == 2:
        y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == 3:
        y = y / (1 + tl.exp(-y))
    return y

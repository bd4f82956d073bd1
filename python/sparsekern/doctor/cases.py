"""What is tried: every op of every format, on shapes that fit the kernels' tiles and on odd ones."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats import BSR, parse_format

PATTERN = "pattern"
"""Beside the ops: pruning and building patterns where the tensors are."""

PRODUCTS = (
    PATTERN,
    "linear",
    "linear_backward_input",
    "linear_backward_weight",
    "linear_backward",
    "scatter",
    "gather",
    "mask_linear",
    "mask_linear_backward",
)
TRITON = tuple(f"triton_{name}" for name in PRODUCTS[1:5])
"""Those in Triton, on GPUs, of the odd shape alone: each kernel takes a second to compile."""
MASKED = PRODUCTS[-2:]
"""Along a bit mask: the same kernels for all formats but BSR."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = (
    *("csr", "bsr4", "bsr16x8", "bsr32", "bsr64", "bsr128", "bsr128x64"),
    *("2:4", "1:4", "2:8", "5:11", "64:2:8", "128:2:16", "32:2:5", "4:2:4"),
)
QUICK_FORMATS = ("csr", "bsr16x8", "bsr64", "2:4", "5:11", "64:2:8")

_TINY, _ODD, _ALIGNED, _LONG, _WIDE = (7, 5), (333, 129), (256, 512), (130, 1000), (333, 14500)
_SHAPES = ((1, 1), _TINY, _ODD, _ALIGNED, _LONG)
_QUICK_SHAPES = (_TINY, _ODD, _ALIGNED)
_BATCHES = (1, 2, 7, 8, 16, 33, 64, 130)  # on both sides of where kernels for few rows of x end
_HOPPER, _HOPPER_BATCH = ((2032, 144), (144, 2032)), 2000
"""What CUTLASS's kernel takes on Hopper: rows of whole 16 bytes, tiles of 128 x 256 for most of a GPU."""
_DENSITIES = (0.0, 0.02, 0.1, 0.4, 1.0)
_SAMPLES = 4


@dataclass(frozen=True)
class Case:
    """One op on random numbers, which follow from ``seed``."""

    device: str
    format: str
    product: str
    dtype: torch.dtype
    shape: tuple[int, int]
    batch: int
    density: float
    layout: str
    seed: int

    @property
    def kernel(self) -> str:
        """The op's name, e.g. ``"csr_linear"``."""
        if self.product in MASKED:
            return self.product
        return f"{parse_format(self.format).kind.format}_{self.product}"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        size = f"W {self.shape[0]}x{self.shape[1]}, batch {self.batch}, {self.layout}"
        density = (
            "" if parse_format(self.format).fixed_sparsity is not None else f", density {self.density:g}"
        )
        return f"{self.kernel} {dtype} on {self.device}, {self.format}, {size}{density}"


def padded(matrix: Tensor) -> Tensor:
    """``matrix`` as a view of a larger one that holds NaN elsewhere: reading the padding spoils a result."""
    rows, columns = matrix.shape
    frame = matrix.new_full((rows + 2, columns + 5), torch.nan)
    frame[1:-1, 3:-2] = matrix
    return frame[1:-1, 3:-2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "batch-major": lambda m: m,
    "feature-major": lambda m: m.t().contiguous().t(),
    "padded batch-major": padded,
    "padded feature-major": lambda m: padded(m.t()).t(),
}
"""How x and the gradient of y lie in memory."""


def plan(
    device: str,
    formats: Sequence[str] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    *,
    quick: bool = False,
    seed: int = 0,
) -> Iterator[Case]:
    """The cases for one device, the ops of one weight after each other.

    Each format, dtype and shape meets some of the batches, densities and layouts, chosen by ``seed``.
    """
    chosen = random.Random(f"{device} {seed}")
    formats = formats or (QUICK_FORMATS if quick else FORMATS)
    samples = 1 if quick else _SAMPLES
    shapes = _QUICK_SHAPES if quick else _SHAPES
    layouts = itertools.cycle(chosen.sample(list(LAYOUTS), len(LAYOUTS)))
    for spec, dtype, shape in itertools.product(formats, dtypes or DTYPES, (*shapes, _WIDE)):
        kind = parse_format(spec)
        if shape == _WIDE and (device == "cpu" or spec != "128:2:16"):
            continue  # it has blocks for all of a GPU, as its gradient of x from selected columns needs
        free = kind.fixed_sparsity is None
        products = PRODUCTS[: -len(MASKED)] if kind.kind is BSR else PRODUCTS
        batches = chosen.sample(_BATCHES, samples)
        if shape == _WIDE:
            batches = [_BATCHES[-1]]
        densities = chosen.sample(_DENSITIES, samples) if free else [1.0] * len(batches)
        for batch, density in zip(batches, densities, strict=True):
            layout, number = next(layouts), chosen.randrange(2**31)
            for product in products:
                yield Case(device, spec, product, dtype, shape, batch, density, layout, number)
            if device.startswith("cuda") and shape == _ODD and batch == batches[0]:
                for product in TRITON:
                    yield Case(device, spec, product, dtype, shape, batch, density, layout, number)
    if device.startswith("cuda") and "2:4" in formats:
        for spec, dtype, shape in itertools.product(("2:4", "1:2"), dtypes or DTYPES, _HOPPER):
            number = chosen.randrange(2**31)
            for product in PRODUCTS[1 : -len(MASKED)]:
                yield Case(device, spec, product, dtype, shape, _HOPPER_BATCH, 1.0, "batch-major", number)

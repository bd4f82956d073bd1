"""Launches the kernels of :mod:`groups` for N:M and V:N:M, and chooses their tiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .common import (
    Config,
    Gpu,
    bucket,
    check_contiguous,
    choose,
    cycles,
    empty_like,
    feature_major,
    fitting,
    gpu_of,
    key,
    precision,
    remembered,
    wrap_triton,
)
from .groups import backward_input_kernel, backward_weight_kernel, linear_kernel

# rows, columns, step, warps, stages
SHORT = (
    *(Config(128, 256, 64, 8, 3), Config(128, 128, 64, 8, 3), Config(64, 128, 64, 8, 3)),
    *(Config(32, 128, 64, 4, 3), Config(16, 128, 64, 4, 3), Config(64, 64, 64, 4, 3)),
    *(Config(64, 32, 64, 4, 4), Config(64, 16, 64, 4, 4), Config(32, 16, 64, 4, 4)),
    Config(16, 16, 64, 4, 4),
)
"""Of 16 bits."""
LONG = (
    Config(64, 64, 16, 8, 3),
    Config(32, 32, 16, 4, 3),
    Config(32, 16, 32, 4, 3),
    Config(16, 16, 32, 4, 3),
)
"""Of float32."""
EXPANSION = 14 / 128
"""Cycles of a multiprocessor for a number of W: its instructions, of which 4 · 32 are issued in one."""
FEW = 64
"""Rows of a batch-major x up to which V:N:M gathers single numbers; more are copied first."""


class Sizes(NamedTuple):
    """Of a pattern: :class:`Groups` has them."""

    rows: int
    groups: int
    all_places: int
    width: int
    tile_rows: int
    split: bool
    selects: bool


@dataclass(frozen=True)
class Groups:
    """A pattern as the kernels of both formats take it.

    Attributes:
        rows, columns: of W.
        n, m: N values in M columns.
        tile_rows: V, at most the rows; N:M: all rows.
        index: uint8 ``[rows, row_values]``.
        packed: uint8 ``[rows, row_bytes]``: the same in :attr:`bits` each.
        selected: V:N:M: int32 ``[row tiles, groups, 4]``, the columns of W. N:M: None.
        chosen: uint8 of the same shape, their places in their groups.
    """

    rows: int
    columns: int
    n: int
    m: int
    tile_rows: int
    index: Tensor
    packed: Tensor
    selected: Tensor | None = None
    chosen: Tensor | None = None

    @property
    def places(self) -> int:
        """Of a group or, of V:N:M with more columns, a part of it: M, rounded up to a power of two."""
        return min(16, 1 << (self.m - 1).bit_length())

    @property
    def parts(self) -> int:
        """Of a group, :attr:`places` in each."""
        return -(-self.m // self.places)

    @property
    def width(self) -> int:
        """Places of a group that are multiplied."""
        return self.places if self.selected is None else 4

    @property
    def bits(self) -> int:
        """Of a position in :attr:`packed`."""
        return 2 if self.selected is not None or self.m <= 4 else 4

    @property
    def groups(self) -> int:
        """Of a row."""
        return -(-self.columns // self.m)

    def row_blocks(self, height: int) -> int:
        """Of ``height`` rows each, none of them in two row tiles."""
        return -(-self.rows // self.tile_rows) * -(-self.tile_rows // height)

    @property
    def sizes(self) -> Sizes:
        """What the choice of tiles depends on."""
        split = self.n & (self.n - 1) == 0
        places, selects = self.places * self.parts, self.selected is not None
        return Sizes(self.rows, self.groups, places, self.width, self.tile_rows, split, selects)


def linear(w: Groups, x: Tensor, values: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    """``y = σ(x Wᵀ + b)``."""
    check_contiguous(values=values, bias=bias)
    y = empty_like(x, w.rows)
    if y.numel() == 0:
        return y
    x, gpu = _gatherable(x, w), gpu_of(x.device)
    config = choice("linear", x.dtype, precision(), w.sizes, bucket(x.shape[0]), gpu)
    blocks = w.row_blocks(config.rows)
    wrap_triton(linear_kernel)[(blocks * -(-x.shape[0] // config.columns),)](
        *(x, values, w.index, w.packed, w.selected, bias, y),
        *(w.rows, w.columns, x.shape[0], w.index.shape[1], w.packed.shape[1], w.tile_rows, blocks),
        *(x.stride(0), x.stride(1), y.stride(0), y.stride(1)),
        N=w.n,
        M=w.m,
        WIDTH=w.width,
        BITS=w.bits,
        ROWS=config.rows,
        COLUMNS=config.columns,
        STEP=max(config.step, w.width),
        STAGES=config.stages,
        ACTIVATION=activation,
        PRECISION=precision(),
        num_warps=config.warps,
    )
    return y


def backward_input(w: Groups, grad: Tensor, values: Tensor) -> Tensor:
    """``dx = g W``."""
    check_contiguous(values=values)
    grad_x = empty_like(grad, w.columns)
    if grad_x.numel() == 0:
        return grad_x
    gpu = gpu_of(grad.device)
    config = choice("input", grad.dtype, precision(), w.sizes, bucket(grad.shape[0]), gpu)
    blocks = -(-w.groups * w.parts // (config.rows // w.places))
    wrap_triton(backward_input_kernel)[(blocks * -(-grad.shape[0] // config.columns),)](
        *(grad, values, w.index, w.packed, w.chosen, grad_x),
        *(w.rows, w.columns, grad.shape[0], w.index.shape[1], w.packed.shape[1], w.tile_rows),
        *(grad.stride(0), grad.stride(1), grad_x.stride(0), grad_x.stride(1)),
        N=w.n,
        M=w.m,
        WIDTH=w.places,
        BITS=w.bits,
        EACH=w.parts,
        ROWS=config.rows,
        COLUMNS=config.columns,
        STEP=config.step,
        STAGES=config.stages,
        PRECISION=precision(),
        num_warps=config.warps,
    )
    return grad_x


def backward_weight(w: Groups, grad: Tensor, x: Tensor) -> Tensor:
    """``dW = gᵀ x``, where W has values."""
    grad_values = x.new_empty(w.index.shape)
    if grad_values.numel() == 0:
        return grad_values
    x, gpu = _gatherable(x, w), gpu_of(x.device)
    config = choice("weight", x.dtype, precision(), w.sizes, bucket(x.shape[0]), gpu)
    width = max(config.columns, w.width)
    blocks = w.row_blocks(config.rows)
    wrap_triton(backward_weight_kernel)[(blocks * -(-w.groups // (width // w.width)),)](
        *(grad, x, w.index, w.selected, grad_values),
        *(w.rows, w.columns, x.shape[0], w.index.shape[1], w.tile_rows, blocks),
        *(grad.stride(0), grad.stride(1), x.stride(0), x.stride(1)),
        N=w.n,
        M=w.m,
        WIDTH=w.width,
        ROWS=config.rows,
        COLUMNS=width,
        STEP=config.step,
        STAGES=config.stages,
        PRECISION=precision(),
        num_warps=config.warps,
    )
    return grad_values


def _gatherable(x: Tensor, w: Groups) -> Tensor:
    """``x`` in the layout from which the selected columns are read best."""
    if w.selected is None or x.stride(0) == 1 or x.shape[0] <= FEW:
        return x
    return feature_major(x)


def configs(dtype: torch.dtype, height: int, gpu: Gpu, split: bool) -> Iterator[Config]:
    """Those whose tiles are no higher than ``height``, the rows of a row tile.

    Registers are left for so many sums: fewer without ``wgmma``, as operands take some too, and where the
    values of a group are loaded one by one, not as a run that is split.
    """
    most = (1 << 15 if split else 1 << 14) if gpu.wgmma else (1 << 14 if split else 1 << 11)
    for config in fitting(LONG if dtype == torch.float32 else SHORT, dtype.itemsize, gpu):
        if config.rows <= max(16, height) and config.rows * config.columns <= most:
            yield config


@remembered
def choice(product: str, dtype: torch.dtype, precision: str, w: Sizes, batch: int, gpu: Gpu) -> Config:
    """The tile of a product, "linear", "input" or "weight"."""

    def cost(config: Config) -> float:
        if product == "input":
            tiles = -(-w.groups * w.all_places // config.rows) * -(-batch // config.columns)
            steps = -(-w.rows // config.step)
        else:
            blocks = -(-w.rows // w.tile_rows) * -(-w.tile_rows // config.rows)
            across, along = w.groups * w.width, batch
            if product == "linear":
                across, along = along, across
            tiles, steps = blocks * -(-across // config.columns), -(-along // config.step)
        expanding = 0.0 if product == "weight" else config.rows * config.step * EXPANSION
        waves = -(-tiles // gpu.multiprocessors)
        return cycles(config, tiles, steps, dtype, gpu) + waves * steps * expanding

    height = w.groups * w.all_places if product == "input" else w.tile_rows
    format = "vnm" if w.selects else "nm"
    name = key(f"{format} {product}", dtype, precision, w.all_places, w.split, min(w.tile_rows, 128), batch)
    return choose(name, configs(dtype, height, gpu, w.split or product == "weight"), cost)

"""The tiles of BSR's products, and which of them serves what."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .common import Config, Gpu, choose, cycles, fitting, key, remembered

# rows, columns, step, warps, stages
_WIDE = (
    *(Config(128, 256, 64, 8, 4), Config(128, 256, 64, 8, 3), Config(128, 128, 64, 4, 3)),
    *(Config(64, 256, 64, 4, 3), Config(32, 256, 64, 4, 3)),
)
"""For ``wgmma``, whose operands stay in shared memory: with them in registers these would spill."""
_SHORT = (
    *(Config(128, 128, 64, 8, 4), Config(64, 128, 64, 4, 4), Config(32, 128, 64, 4, 4)),
    *(Config(16, 128, 64, 4, 4), Config(64, 64, 64, 4, 4), Config(16, 64, 64, 4, 4)),
    *(Config(32, 32, 128, 4, 4), Config(16, 16, 128, 4, 4)),
)
_TF32 = (
    *(Config(128, 128, 32, 8, 3), Config(64, 128, 32, 4, 3), Config(64, 64, 32, 4, 3)),
    *(Config(32, 64, 32, 4, 3), Config(16, 64, 32, 4, 3), Config(16, 16, 64, 4, 3)),
)
_FLOAT32 = (
    *(Config(64, 64, 32, 8, 3), Config(32, 64, 32, 4, 3), Config(16, 64, 16, 4, 3)),
    *(Config(64, 32, 32, 8, 3), Config(16, 16, 32, 4, 3)),
)
"""Without tensor cores, whose steps are written out multiplication by multiplication."""


def configs(dtype: torch.dtype, precision: str, height: int, gpu: Gpu) -> Iterator[Config]:
    """Those for blocks that are ``height`` high in the result."""
    if dtype == torch.float32:
        every: tuple[Config, ...] = _FLOAT32 if precision == "ieee" else _TF32
    else:
        every = (*_WIDE, *_SHORT) if gpu.wgmma else _SHORT
    for config in fitting(every, dtype.itemsize, gpu):
        if config.rows <= max(16, height):
            yield config


@remembered
def product_config(
    dtype: torch.dtype, precision: str, height: int, block_rows: int, depth: int, batch: int, gpu: Gpu
) -> Config:
    """For a product with W or its transpose, of which a tenth of the blocks is expected to be there."""

    def cost(config: Config) -> float:
        tiles = block_rows * -(-height // config.rows) * -(-batch // config.columns)
        return cycles(config, tiles, depth / 10 / config.step, dtype, gpu)

    name = key("bsr", dtype, precision, height, batch)
    return choose(name, configs(dtype, precision, height, gpu), cost)


@remembered
def weight_config(
    dtype: torch.dtype, precision: str, block: tuple[int, int], grid: tuple[int, int], batch: int, gpu: Gpu
) -> Config:
    """For the gradient of the values, of a ``grid`` of blocks with as many."""
    (height, width), blocks = block, -(-grid[0] * grid[1] // 10)

    def cost(config: Config) -> float:
        tiles = blocks * -(-height // config.rows) * -(-width // config.columns)
        if config.columns > width:  # a run ends where its row does, so some are not full
            tiles = -(-3 * blocks * width // (2 * config.columns))
        return cycles(config, tiles, batch / config.step, dtype, gpu)

    name = key("bsr weight", dtype, precision, height, batch)
    return choose(name, configs(dtype, precision, height, gpu), cost)

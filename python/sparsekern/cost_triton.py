"""What a product costs in Triton, by arithmetic: for ``backend="auto"``.

It counts where there are no native GPU kernels, or ``tune`` measured these to be slower.

**Not yet measured on a GPU.** As in :mod:`.cost_gpu` a product takes as long as what bounds it. Other than
the native kernels, Triton's run ``wgmma`` on Hopper, but no sparse tensor cores: N:M saves bytes alone, and
V:N:M leaves columns out. The dense product scatters W by torch's own ops each time.
"""

from __future__ import annotations

import math

import torch

from .cost import MARGIN, family, remembered_at
from .cost_gpu import Facts, Gpu, copy_seconds, dense_seconds, of_device
from .dense import NATIVE, Plan
from .formats import Pattern
from .triton_profile import SPEEDUPS, speedup_key

SHARE = 0.8
"""Of cuBLAS's rate, in tiles as large as its own: they are read without multicast. As others measured it."""
STREAMED = 0.7
"""Of memory's rate, by programs that each read a part of W."""


def seconds(facts: Facts, product: str, batch: int, dtype: torch.dtype, gpu: Gpu) -> float:
    """Of a ``"forward"``, ``"backward_input"`` or ``"backward_weight"``."""
    size, element = facts.shape[0] * facts.shape[1], dtype.itemsize
    rows = -(-batch // 16) * 16
    exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    rate = (0.5 if exact else SHARE) * gpu.dense_rate(dtype)
    moved = facts.values * (element + 1) + batch * sum(facts.shape) * element
    memory = moved / (STREAMED * gpu.hbm)
    if facts.format == "csr":
        # Two numbers from L1, 64 bytes in a cycle, for each multiply-add; its index besides.
        along = facts.values * rows * 2 * element / 64 / gpu.cycles
        dense = size * rows / rate
        return float(max(min(along, dense) if product == "backward_weight" else along, memory))
    if facts.format == "bsr":
        height, width = facts.options["block"]
        tall = width if product == "backward_input" else height
        wide = 128 if product == "backward_weight" else 256
        filled = min(1.0, tall / 16)  # of a tile's rows
        again = facts.values * rows * element * (1 / min(tall, 128) + 1 / min(wide, rows))
        return float(max(facts.values * rows / (filled * rate), again / gpu.l2, memory))
    selects = facts.format == "vnm" and product != "backward_input"
    share = 4 / facts.options["m"] if selects else 1.0
    multiplying = max(size * share * rows / rate, memory)
    if product == "backward_weight":
        return multiplying
    # W is expanded anew for each 256 rows of x: some 14 instructions per number, of 128 that are issued in a
    # cycle.
    return float(multiplying + -(-batch // 256) * size * share * 14 / 128 / gpu.cycles)


def beats_dense(pattern: Pattern, batch: int, dtype: torch.dtype, need_x: bool, need_values: bool) -> bool:
    """Whether a call, with the gradients that are needed, is predicted to be faster than densely."""
    where = remembered_at(batch, dtype, need_x, need_values)
    at = ("triton", *where, torch.get_float32_matmul_precision())
    found: bool | None = pattern.memo.get(at)
    if found is None:
        gpu = of_device(pattern.device)
        found = pattern.memo[at] = _wins(Facts.of(pattern), where[0], dtype, gpu, need_x, need_values)
    return found


def beats_native(
    pattern: Pattern, batch: int, dtype: torch.dtype, need_x: bool, need_values: bool, plan: Plan
) -> bool:
    """Whether ``tune`` measured Triton's kernels to be faster in such a call, and dense is not faster yet."""
    name = speedup_key(family(pattern), dtype, batch, need_x or need_values)
    if SPEEDUPS.get(name, 0.0) * MARGIN <= 1.0:
        return False
    return plan == NATIVE or beats_dense(pattern, batch, dtype, need_x, need_values)


def _wins(facts: Facts, batch: int, dtype: torch.dtype, gpu: Gpu, need_x: bool, need_values: bool) -> bool:
    if batch == 0:
        return True
    needed = {"forward": True, "backward_input": need_x, "backward_weight": need_values}
    products = [product for product, wanted in needed.items() if wanted]
    own = math.fsum(seconds(facts, product, batch, dtype, gpu) for product in products)
    copies = 2 if need_values else 1
    dense = len(products) * dense_seconds(facts.shape, batch, dtype, gpu)
    return own <= MARGIN * (dense + copies * copy_seconds(facts, dtype, gpu))


# By what `_wins` says of 4096 x 4096 on Hopper: for inference with up to 16 rows of x, and for training with
# 4096; in 16 bits, and in float32.
_COMPILED_PERCENT = {
    "csr": {True: (29, 25), False: (0, 7)},
    "bsr4": {True: (100, 52), False: (2, 11)},
    "bsr8": {True: (100, 100), False: (5, 23)},
    "bsr16": {True: (100, 100), False: (10, 47)},
    "bsr32": {True: (100, 100), False: (18, 47)},
    "bsr64": {True: (100, 100), False: (33, 47)},
    "bsr128": {True: (100, 100), False: (54, 47)},
    "nm": {True: (100, 100), False: (0, 0)},
    "vnm": {True: (100, 100), False: (13, 0)},
}


def beats_dense_if_compiled(pattern: Pattern, few: bool, dtype: torch.dtype) -> bool:
    """The choice for a compiled graph, by density: ``few`` rows of x, up to 16, tell decoding from more."""
    name = f"bsr{min(*pattern.options['block'])}" if pattern.format == "bsr" else pattern.format
    percent = _COMPILED_PERCENT[name][few][dtype == torch.float32]
    return 100 * pattern.nnz <= percent * pattern.shape[0] * pattern.shape[1]

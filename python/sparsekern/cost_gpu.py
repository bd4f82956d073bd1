"""What a product costs on a GPU, by arithmetic: the model behind ``backend="auto"`` there.

**Not yet measured on a GPU.** A product takes as long as what bounds it, at the rates of :data:`HOPPER` or
:data:`AMPERE`: ``t = max(multiply-adds / rate, bytes of memory / hbm, bytes of x read again / l2)``. Only
ratios of two times are used. What the native kernels do is written where its term stands.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from ._library import LOAD_ERROR
from .copies import has_mask_on_gpu
from .cost import MARGIN, Prediction, remembered_at
from .dense import NATIVE, By, Plan
from .formats import Pattern
from .formats.metadata import Metadata


@dataclass(frozen=True)
class Gpu:
    """Rates per second: of torch's dense products and copies, and of a multiprocessor.

    Attributes:
        dense: multiply-adds of cuBLAS in 16 bits, in float32, and in TF32.
        mma: what the warp-wide ``mma.sync`` of the native kernels reaches of cuBLAS's rate in 16 bits. On
            Hopper cuBLAS runs ``wgmma``, which alone feeds the tensor cores in full.
        hbm: bytes of memory.
        l2: bytes of the L2 cache.
        multiprocessors: how many there are.
        clock: of them.
        shared: bytes of shared memory that a block of threads can have.
        cutlass: multiply-adds of a dense product in the time that CUTLASS takes for a 2:4 one, 0 where the
            library holds no such kernel for the GPU.
    """

    dense: tuple[float, float, float]
    mma: float
    hbm: float
    l2: float
    multiprocessors: int
    clock: float
    shared: int
    cutlass: float = 0.0

    def dense_rate(self, dtype: torch.dtype) -> float:
        """Multiply-adds of torch's dense product, as its precision is set for float32."""
        if dtype != torch.float32:
            return self.dense[0]
        return self.dense[1] if torch.get_float32_matmul_precision() == "highest" else self.dense[2]

    @property
    def cycles(self) -> float:
        """Of all multiprocessors."""
        return self.multiprocessors * self.clock


HOPPER = Gpu(
    (395e12, 25e12, 190e12),
    0.62,
    hbm=4.3e12,
    l2=5.5e12,
    multiprocessors=132,
    clock=1.755e9,
    shared=227 << 10,
    cutlass=1.2 * 395e12,  # as others measured it on H100
)
"""An H200: 790 TFLOP/s in bfloat16 and 4.3 TB/s through torch. Also, but for CUTLASS, what came after it."""
AMPERE = Gpu(
    (125e12, 8e12, 60e12), 0.85, hbm=1.6e12, l2=3.5e12, multiprocessors=108, clock=1.41e9, shared=163 << 10
)
"""An A100, whose cuBLAS runs ``mma.sync`` too."""

SPARSE_GAIN = 1.77
"""Sparse tensor cores over dense ones: 2 in theory, this on H100 as measured by others."""
LATENCY = 0.7e-6
"""Of a read from memory. A block of threads has two steps of 64 columns of W under way: a grid of few blocks,
as few rows of x make it, reads its weight no faster."""
ENOUGH_BLOCKS = 256
"""Of N:M and V:N:M: where there are fewer, blocks divide the columns, 256 at least for each."""
FEW = 32
"""Rows of x up to which CSR runs on ``csr_few.h``."""
SECOND_KERNEL = 1.5e-6
"""What it takes to launch one more: to add up the parts of sums, where blocks divide the columns among them,
or to transpose values."""


@functools.cache
def of_device(device: torch.device) -> Gpu:
    """The rates for a CUDA device, by its compute capability, and what it says of itself."""
    found: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack what is asked for
    capability = (found.major, found.minor)
    with_cutlass = capability == (9, 0) and LOAD_ERROR is None and torch.ops.sparsekern.cutlass()
    cutlass = HOPPER.cutlass if with_cutlass else 0.0
    return replace(
        HOPPER if capability >= (9, 0) else AMPERE,
        multiprocessors=found.multi_processor_count,
        shared=found.shared_memory_per_block_optin,
        cutlass=cutlass,
    )


@dataclass(frozen=True)
class Facts:
    """What of a pattern decides how long its products take.

    Attributes:
        format: ``"csr"``, ``"bsr"``, ``"nm"`` or ``"vnm"``.
        shape: ``(out, in)``.
        values: how many are stored.
        options: of the format: ``block``, or ``n``, ``m`` and ``v``.
        transposable: W and Wᵀ are 2:4.
    """

    format: str
    shape: tuple[int, int]
    values: int
    options: dict[str, Any]
    transposable: bool = False

    @classmethod
    def of(cls, pattern: Pattern) -> Facts:
        """Those of ``pattern``."""
        derived = getattr(pattern, "derived", None)
        both_ways = isinstance(derived, Metadata) and derived.of_both
        return cls(pattern.format, pattern.shape, math.prod(pattern.values_shape), pattern.options, both_ways)


def dense_seconds(shape: tuple[int, int], batch: int, dtype: torch.dtype, gpu: Gpu) -> float:
    """Of one dense product of ``shape``, forward or a gradient: each has these multiply-adds and bytes."""
    size = shape[0] * shape[1]
    moved = (size + batch * sum(shape)) * dtype.itemsize
    return max(size * batch / gpu.dense_rate(dtype), moved / gpu.hbm)


def copy_seconds(facts: Facts, dtype: torch.dtype, gpu: Gpu) -> float:
    """Of a scatter or a gather: W, its values, and up to 4 bytes of position for each."""
    size = facts.shape[0] * facts.shape[1]
    return (size * dtype.itemsize + facts.values * (dtype.itemsize + 4)) / gpu.hbm


def native_seconds(facts: Facts, product: str, batch: int, dtype: torch.dtype, gpu: Gpu) -> float:
    """Of a native ``"forward"``, ``"backward_input"`` or ``"backward_weight"``."""
    rows, columns = facts.shape if product != "backward_input" else facts.shape[::-1]
    size, element, fast = rows * columns, dtype.itemsize, dtype != torch.float32
    through = batch * (rows + columns) * element  # x and y, once each
    if facts.format == "csr":
        return _csr(facts, product, batch, element, through, gpu)
    if product == "backward_input" and facts.transposable and fast:
        turned = replace(facts, shape=facts.shape[::-1], transposable=False)
        values = facts.values * (2 * element + 0.25) / gpu.hbm
        return SECOND_KERNEL + values + native_seconds(turned, "forward", batch, dtype, gpu)
    density, expanding = facts.values / size if size else 0.0, 0.0
    moved = facts.values * (element + 0.25) + through
    tensor = (
        gpu.mma * gpu.dense[0] if fast else 0.5 * gpu.dense[1]
    )  # float32: fused multiply-adds, half the peak
    if facts.format == "bsr":
        height, width = (
            facts.options["block"] if product != "backward_input" else facts.options["block"][::-1]
        )
        if min(height, width) < 16 or not fast:
            tensor = 0.5 * gpu.dense[1]  # bsr_simple.h, in 16 bits too
        share, tall, step = density, height, 64 * element
        # A number of x in shared memory is used `height` times; g, for gradients of the values, 128 times.
        again = size * density * batch * element * (1 / height + (product == "backward_weight") / 128)
    else:
        n, m = facts.options["n"], facts.options["m"]
        chosen = 4 / m if facts.format == "vnm" else 1.0  # columns that a tile of rows selects
        width = 4 if facts.format == "vnm" else m
        tall = min(facts.options["v"], 128) if facts.format == "vnm" else 128
        share, again = chosen, size * chosen * batch * element / tall
        step = 64 * n / width * (element + 0.25)
        if product == "forward" and fast and (time := _cutlass(facts, batch, gpu)):
            return max(time, (moved + size * element / 16) / gpu.hbm)
        if product == "forward" and fast and ((n <= 2 and width % 4 == 0) or (n, width) == (1, 2)):
            tensor *= SPARSE_GAIN
        elif product != "backward_weight":
            # W is expanded in shared memory on the way: 30 instructions of a lane for each value, 60 where
            # its column is looked up, of which a multiprocessor issues 128 in a cycle.
            lookup = facts.format == "vnm" and product == "backward_input"
            expanding = -(-batch // 128) * facts.values * (60 if lookup else 30) / 128 / gpu.cycles
        if product == "backward_input":  # W's columns are multiplied as they stand, and they alone divided
            share, tall, again = 1.0, 128, size * batch * element / 128
            filled = min(1.0, max(1, -(-rows // 128) * -(-batch // 128)) / gpu.multiprocessors)
            tensor, expanding = tensor * filled, expanding / filled
            if fast and (wide := _selected(facts, batch, gpu)):
                tensor, expanding = 0.8 * tensor * wide / (160 if m < 20 else 128), 0.0
                again = size * batch * element / wide
    blocks, parts = math.ceil(rows / tall) * math.ceil(batch / 128), 1
    if facts.format != "bsr" and product == "forward":
        parts = max(1, min(math.ceil(ENOUGH_BLOCKS / max(blocks, 1)), int(columns * share) // 256))
    reading = blocks * parts * 2 * tall * step / LATENCY
    hbm = gpu.hbm if product == "backward_weight" else min(gpu.hbm, reading)
    computing = size * share * _padded(batch) / tensor + expanding
    whole = max(computing, again / gpu.l2, moved / hbm if moved else 0.0)
    return float(whole) + _adding(parts, batch * rows, gpu)


def _selected(facts: Facts, batch: int, gpu: Gpu) -> int:
    """Columns of W of a block of ``groups_selected.h``, which makes grad W of V:N:M; 0 where it does not run.

    A step of it takes 1500 cycles of instructions, with 64 selected columns 1900. Blocks are as wide as
    shared memory allows, on Ampere mostly too narrow to gain.
    """
    m = facts.options["m"]
    if facts.format != "vnm" or m < 16 or facts.options["v"] % 64 or facts.options["n"] != 2:
        return 0
    for slots in (64, 32, 16):
        wide = slots // 4 * m
        need = 3 * (16384 + 128 * slots) + 520 * wide
        if need <= 227 << 10:
            blocks = -(-facts.shape[1] // wide) * -(-batch // 128)
            return wide if need <= gpu.shared and 4 * blocks >= 3 * gpu.multiprocessors else 0
    return 0


def _csr(facts: Facts, product: str, batch: int, element: int, through: float, gpu: Gpu) -> float:
    weight = facts.values * (element + 4.0)
    if product == "backward_weight":
        # csr_dots.h: a number of x from L2 per multiply-add.
        return max(facts.values * batch * element / gpu.l2, (weight + through) / gpu.hbm)
    if batch <= FEW:
        # csr_few.h: W once for 8 rows of x, later from L2. A warp's 32 gathers from L1 take some 16 cycles,
        # for each meets a line of its own.
        passes = -(-batch // 8)
        read = weight / gpu.hbm + (passes - 1) * weight / gpu.l2
        return max(read, facts.values * passes * 0.5 / gpu.cycles, through / gpu.hbm)
    # csr_many.h: per value and 64 rows of x 1.5 cycles of shared memory, 2.5 in float32.
    cycles = facts.values * -(-batch // 64) * (0.5 + element / 2)
    return max(cycles / gpu.cycles, (weight + through) / gpu.hbm)


def _cutlass(facts: Facts, batch: int, gpu: Gpu) -> float:
    """Of nm_hopper.cu's product, or 0 where it does not run.

    It makes 128 x 256 tiles, two at a time, of which three quarters of its waves must be full; and takes x
    and y that are batch-major, which is taken for granted here.
    """
    rows, columns = facts.shape
    if not gpu.cutlass or facts.format != "nm" or rows % 8 or columns % 16:
        return 0.0
    if (facts.options["n"], facts.options["m"]) not in ((2, 4), (1, 2)):
        return 0.0
    tiles = math.ceil(rows / 256) * 2 * math.ceil(batch / 256)
    room = math.ceil(tiles / gpu.multiprocessors) * gpu.multiprocessors * 128 * 256
    return room * columns / gpu.cutlass if 4 * rows * batch >= 3 * room else 0.0


def masked_seconds(facts: Facts, product: str, batch: int, dtype: torch.dtype, gpu: Gpu) -> float:
    """Of a ``"forward"`` or ``"backward_weight"`` along a bit mask; infinite where there is none."""
    if facts.format == "bsr" or dtype == torch.float32 or product == "backward_input":
        return math.inf
    rows, columns = facts.shape
    size, element = rows * columns, dtype.itemsize
    weight, through = facts.values * element + size * 1.25 / 8, batch * (rows + columns) * element
    if product == "backward_weight":
        # mask_weight.h: 128 x 128 of a dense product, whose sums pass shared memory, 1/16 cycle per weight,
        # and are picked by 85 instructions per 128 of them, 4 at a time.
        multiplies = size * -(-batch // 64) * 64 / (gpu.mma * gpu.dense[0])
        again = size * batch * element * 2 / 128
        return max(multiplies + size * 0.23 / gpu.cycles, again / gpu.l2, (weight + through) / gpu.hbm)
    # mask_few.h, 64 rows of x at a time. Per weight some 10 instructions (8.8 to 10.6, as ptxas made them for
    # sm_90), of which 4 warps issue one in a cycle, and 0.3 more for each 8 rows of x after the first; or a
    # load from shared memory, of 1.1 cycles at a density of 10 % and 2.3 at 50 %, as lanes meet in its banks,
    # beside 4 for 512 weights and 8 rows of x. x comes again per block of rows.
    passes, tiles = -(-batch // 64), -(-min(batch, 64) // 8)
    height = next((16 * h for h, most in ((1, 4), (2, 16), (4, 32)) if batch <= most), 128)
    issued, loads = (9.7 + 0.3 * tiles) / 128, (0.85 + 2.9 * facts.values / max(size, 1)) / 32 + tiles / 128
    expanding = passes * size * max(issued, loads) / gpu.cycles
    multiplies = passes * size * 8 * tiles / (gpu.mma * gpu.dense[0])
    again = size * batch * element / height + (passes - 1) * weight
    whole = max(expanding, multiplies, again / gpu.l2, (weight + through) / gpu.hbm)
    blocks = max(-(-rows // height) * passes, 1)
    return whole + _adding(-(-128 // blocks), batch * rows, gpu)


def _adding(parts: int, numbers: int, gpu: Gpu) -> float:
    """Of a second kernel that adds up float32 parts of y, which pass L2 twice."""
    return SECOND_KERNEL + 2 * parts * numbers * 4 / gpu.l2 if parts > 1 else 0.0


def _padded(batch: int) -> int:
    """Rows of x that tensor cores multiply."""
    return -(-batch // 32) * 32


def predict(
    facts: Facts,
    batch: int,
    dtype: torch.dtype,
    gpu: Gpu,
    need_x: bool = True,
    need_values: bool = True,
    keeps: bool = True,
    plan: Plan | None = None,
    masked: bool = True,
) -> Prediction:
    """:func:`.cost.predict` by arithmetic alone; ``keeps`` tells whether inference keeps a copy of W.

    There each product is a kernel of its own, so any of them may run dense; along the mask, where ``masked``
    tells that there is one, any but the gradient of x.
    """
    needed = (True, need_x, need_values)
    products = ("forward", "backward_input", "backward_weight")
    native = [native_seconds(facts, product, batch, dtype, gpu) for product in products]
    along = [masked_seconds(facts, product, batch, dtype, gpu) for product in products]
    dense = dense_seconds(facts.shape, batch, dtype, gpu)
    whole = facts.format != "bsr" and facts.values == facts.shape[0] * facts.shape[1]
    copy = 0.0 if whole else copy_seconds(facts, dtype, gpu)

    def seconds_of(plan: Plan) -> float:
        times = (
            {By.DENSE: dense, By.NATIVE: own, By.MASK: mask}[by]
            for by, own, mask, wanted in zip(plan, native, along, needed, strict=True)
            if wanted
        )
        scatters = need_x or need_values or not keeps
        copies = (
            scatters and (plan.forward is By.DENSE or (plan.grad_x is By.DENSE and need_x)),
            plan.grad_values is By.DENSE and need_values,
        )
        return sum(times) + sum(copies) * copy

    def handicapped(plan: Plan) -> float:
        if By.MASK in plan:  # which is made and kept
            return seconds_of(plan) / MARGIN**2
        return seconds_of(plan) / (MARGIN if plan == NATIVE else 1.0)

    if plan is None:
        plan = min(_plans(need_x, need_values, masked and math.isfinite(along[0])), key=handicapped)
    return Prediction(plan, seconds_of(plan), dense * sum(needed))


def _plans(need_x: bool, need_values: bool, masked: bool) -> list[Plan]:
    """Those that differ. A gradient that is not needed is said to run as another product does."""
    both = (By.DENSE, By.NATIVE)
    every = (*both, By.MASK) if masked else both
    found = []
    for forward in every:
        as_forward = By.NATIVE if forward is By.MASK else forward
        for grad_values in every if need_values else (None,):
            as_values = By.NATIVE if grad_values is By.MASK else grad_values or as_forward
            for grad_x in both if need_x else (as_values,):
                found.append(Plan(forward, grad_x, grad_values or grad_x))
    return found


def choose(
    pattern: Pattern, batch: int, dtype: torch.dtype, need_x: bool, need_values: bool, keeps: bool
) -> Plan:
    """:func:`.cost.choose` on a GPU. While a graph is captured, no copy of W is kept."""
    if batch == 0:
        return NATIVE
    where = remembered_at(batch, dtype, need_x, need_values)
    masked = has_mask_on_gpu(pattern, capturing=not keeps)
    at = (*where, keeps, masked, torch.get_float32_matmul_precision())
    plan: Plan | None = pattern.memo.get(at)
    if plan is None:
        gpu = of_device(pattern.device)
        made = predict(Facts.of(pattern), where[0], dtype, gpu, need_x, need_values, keeps, masked=masked)
        plan = pattern.memo[at] = made.plan
    return plan


# By what predict says of 4096 x 4096 on Hopper: for inference with up to 16 rows of x, and for training
# with 4096; in 16 bits, and in float32. The dense product scatters each time.
_COMPILED_PERCENT = {
    "csr": {True: (29, 69), False: (1, 10)},
    "bsr16": {True: (100, 100), False: (10, 47)},
    "bsr32": {True: (100, 100), False: (20, 47)},
    "bsr64": {True: (100, 100), False: (38, 47)},
    "bsr128": {True: (100, 100), False: (56, 47)},
    "bsr": {True: (70, 100), False: (3, 41)},
    "nm": {True: (100, 0), False: (0, 0)},
    "vnm": {True: (100, 25), False: (0, 0)},
    "vnm128": {True: (100, 25), False: (13, 0)},
}


def native_if_compiled(pattern: Pattern, few: bool, dtype: torch.dtype) -> bool:
    """:func:`.cost.native_if_compiled` on a GPU: ``few`` rows of x, up to 16, tell decoding from training."""
    options, name = pattern.options, pattern.format
    if name == "bsr":
        side = min(*options["block"])
        name = "bsr" if side < 16 else f"bsr{side}"
    elif name == "vnm" and options["v"] >= 128:
        name = "vnm128"
    percent = _COMPILED_PERCENT[name][few][dtype == torch.float32]
    return 100 * pattern.nnz <= percent * pattern.shape[0] * pattern.shape[1]

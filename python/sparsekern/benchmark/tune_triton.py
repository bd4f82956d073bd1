"""The GPU's part of ``python -m sparsekern tune``: tiles of Triton's kernels, and what these gain."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._library import has_kernel
from ..cost import family
from ..formats import Pattern, parse_format
from ..formats import triton_products as triton
from ..formats.products import PRODUCTS, Products
from ..triton_profile import BATCHES, speedup_key
from .progress import progress
from .timing import quantile

if TYPE_CHECKING:
    from ..triton_kernels.common import Config

SPECS: Mapping[str, Sequence[str]] = {
    "csr": ("csr",),
    "bsr": ("bsr4", "bsr16", "bsr32", "bsr64", "bsr128"),
    "nm": ("2:4", "1:4", "2:8"),
    "vnm": ("64:2:8", "128:2:16"),
}
"""By format, what is measured."""
SHAPE = (4096, 4096)
_SPARSITY = 0.9
_ROUNDS = 20


def measure(
    device: str = "cuda", dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32)
) -> dict[str, Config]:
    """The fastest tile of each choice that the kernels make; of bfloat16 also taken for float16."""
    found: dict[str, Config] = {}
    specs = [spec for format in triton.FORMATS for spec in SPECS[format]]
    for spec, dtype, batch in progress(list(itertools.product(specs, dtypes, BATCHES))):
        for call in _calls(spec, dtype, batch, device):
            for name, config in fastest(call, seconds_on_gpu).items():
                found.setdefault(name, config)
    return found | {name.replace("/bfloat16/", "/float16/"): config for name, config in found.items()}


def compare(
    device: str = "cuda", dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float16, torch.float32)
) -> dict[str, float]:
    """How many times as fast as the native kernels, for each family; the least of what is measured of one."""
    found: dict[str, float] = {}
    specs = [spec for format in triton.FORMATS for spec in SPECS[format]]
    for spec, dtype, batch in progress(list(itertools.product(specs, dtypes, BATCHES))):
        pattern = _pattern(spec, device)
        if not has_kernel(f"{pattern.format}_linear_backward", pattern.device.type):
            continue
        for training, ratio in ratios(pattern, dtype, batch, seconds_on_gpu).items():
            name = speedup_key(family(pattern), dtype, batch, training)
            found[name] = min(ratio, found.get(name, ratio))
    return found


def ratios(
    pattern: Pattern, dtype: torch.dtype, batch: int, seconds: Callable[[Callable[[], Any]], float]
) -> dict[bool, float]:
    """Of y alone (False), and of y and both gradients (True): native time over Triton's."""
    x, grad, values = _operands(pattern, dtype, batch)

    def times(ops: Products) -> tuple[float, float]:
        at = ops.operands(pattern)
        forward = seconds(lambda: ops.forward(x, values, None, *at))
        return forward, forward + seconds(lambda: ops.backward(grad, x, values, *at, True, True, False))

    native, own = times(PRODUCTS[pattern.format]), times(triton.products(pattern.format))
    return {False: native[0] / own[0], True: native[1] / own[1]}


def fastest(call: Callable[[], Any], seconds: Callable[[Callable[[], Any]], float]) -> dict[str, Config]:
    """What a call of the kernels chooses among, and the best of each by ``seconds``."""
    from ..triton_kernels import common

    kept, best = dict(common.TUNED), {}
    common.TUNED.clear()
    common.forget()
    try:
        call()
        for name, configs in list(common.ASKED.items()):
            times = {}
            for config in configs:
                common.TUNED[name] = config
                common.forget()
                times[config] = seconds(call)
            best[name] = common.TUNED[name] = min(times, key=lambda config: times[config])
        return best
    finally:
        common.TUNED.clear()
        common.TUNED.update(kept)
        common.forget()


def seconds_on_gpu(call: Callable[[], Any]) -> float:
    """The median of some runs, by the GPU's own clock. Weights of up to 30 MB stay in its L2 cache."""
    for _ in range(3):  # the first compiles
        call()
    torch.cuda._sleep(20_000_000)  # 10 ms: what follows waits in the GPU's queue, and the host is not timed
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(_ROUNDS + 1)]
    for mark in marks[:-1]:
        mark.record()
        call()
    marks[-1].record()
    torch.cuda.synchronize()
    times = [before.elapsed_time(after) for before, after in itertools.pairwise(marks)]
    return 1e-3 * quantile(times, 0.5)


def _calls(spec: str, dtype: torch.dtype, batch: int, device: str) -> Iterator[Callable[[], Any]]:
    pattern = _pattern(spec, device)
    at, ops = pattern.gpu_operands, triton.products(pattern.format)
    x, grad, values = _operands(pattern, dtype, batch)
    yield lambda: ops.forward(x, values, None, *at)
    yield lambda: ops.backward_input(grad, values, *at)
    if batch > BATCHES[0]:
        yield lambda: ops.backward_weight(grad, x, *at)


def _pattern(spec: str, device: str) -> Pattern:
    kind = parse_format(spec)
    sparsity = _SPARSITY if kind.fixed_sparsity is None else None
    return kind.random(SHAPE, sparsity, torch.Generator().manual_seed(0)).to(device)


def _operands(pattern: Pattern, dtype: torch.dtype, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, the gradient of y, and values."""
    shapes = ((batch, pattern.shape[1]), (batch, pattern.shape[0]), pattern.values_shape)
    x, grad, values = (torch.randn(shape, device=pattern.device, dtype=dtype) for shape in shapes)
    return x, grad, values

"""The GPU's part of ``python -m sparsekern tune``: which tiles of Triton's kernels are the fastest."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..formats import parse_format
from ..formats import triton_products as triton
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
BATCHES = (16, 64, 256, 4096)
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
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(_ROUNDS + 1)]
    for mark in marks[:-1]:
        mark.record()
        call()
    marks[-1].record()
    torch.cuda.synchronize()
    times = [before.elapsed_time(after) for before, after in itertools.pairwise(marks)]
    return 1e-3 * quantile(times, 0.5)


def _calls(spec: str, dtype: torch.dtype, batch: int, device: str) -> Iterator[Callable[[], Any]]:
    kind = parse_format(spec)
    sparsity = _SPARSITY if kind.fixed_sparsity is None else None
    pattern = kind.random(SHAPE, sparsity, torch.Generator().manual_seed(0)).to(device)
    at, ops = pattern.gpu_operands, triton.products(pattern.format)
    x, grad = (torch.randn(batch, size, device=device, dtype=dtype) for size in reversed(SHAPE))
    values = torch.randn(pattern.values_shape, device=device, dtype=dtype)
    yield lambda: ops.forward(x, values, None, *at)
    yield lambda: ops.backward_input(grad, values, *at)
    if batch > BATCHES[0]:
        yield lambda: ops.backward_weight(grad, x, *at)

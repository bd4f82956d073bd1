"""Running cases: build every contender, hold their results against each other, time them, make rows."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

import torch
from torch import Tensor

from ..formats import CSR
from ..nn import SparseLinear
from . import results
from .cases import Case
from .contenders import Contender
from .results import Row
from .roofline import Roofline, cache_bytes, native_module
from .timing import quantile, race, speedup
from .workload import (
    Call,
    call_of,
    check_equal,
    comparable,
    in_layout,
    inputs_of,
    rotate,
    weight_bytes,
    weight_of,
)


@dataclass(frozen=True)
class Facts:
    """What all rows of a run have in common."""

    run: str
    commit: str
    machine: str
    device: str
    threads: int
    torch: str

    @classmethod
    def now(cls) -> Facts:
        """Those of a run that starts now in this process."""
        start = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        return cls(
            start,
            results.commit(),
            results.machine(),
            results.device(),
            torch.get_num_threads(),
            torch.__version__,
        )


def run_case(
    case: Case,
    contenders: Sequence[Contender],
    facts: Facts,
    roofline: Roofline,
    *,
    rounds: int = 11,
    min_seconds: float = 0.01,
) -> list[Row]:
    """Time ``case`` on all ``contenders`` that take it, in turns; one row each.

    Raises:
        RuntimeError: a contender's result differs from the dense layer's: a wrong answer has no speed.
    """
    weight = weight_of(case.out_features, case.in_features, case.format, case.sparsity, case.dtype)
    mask = weight.mask
    x, grad = inputs_of(case)
    entries = {f"{c.backend} {c.layout}": c for c in contenders if c.refuses(case) is None}
    with torch.set_grad_enabled(case.product != "forward"):
        expected = comparable(call_of(weight.linear, case, x, grad)(), weight.linear, mask, case)
        calls: dict[str, Call] = {}
        sizes = {}
        for name, contender in entries.items():
            module = weight.module(contender, case)
            sizes[name] = weight_bytes(module)
            copies = 1 + -(-4 * cache_bytes() // sizes[name]) if case.cold else 1
            data = [
                in_layout(tensor.to(contender.dtype or case.dtype), contender.layout) for tensor in (x, grad)
            ]
            modules = [module, *(copy.deepcopy(module) for _ in range(copies - 1))]
            calls[name] = rotate([call_of(each, case, *data) for each in modules])
            check_equal(f"{case}: {name}", comparable(calls[name](), module, mask, case), expected, case)
        peaks: list[float] = []
        bandwidth, source = roofline.read_gbs(), roofline.source(case.dtype)
        times = race(
            calls,
            rounds=rounds,
            min_seconds=min_seconds,
            before_round=lambda: peaks.append(roofline.gflops(source)),
        )
    return as_rows(case, entries, times, mask, sizes, facts, peaks, source, bandwidth)


def as_rows(
    case: Case,
    entries: dict[str, Contender],
    times: Mapping[str, Sequence[float]],
    mask: Tensor,
    sizes: Mapping[str, int],
    facts: Facts,
    peaks: Sequence[float],
    source: str,
    bandwidth: float,
) -> list[Row]:
    """What was measured of a case, a row per contender.

    Args:
        case: what was computed.
        entries: the contenders by a name for each, "<backend> <layout>".
        times: seconds of a call, a reading per round, by name.
        mask: bool ``[out, in]``, where the weight has values.
        sizes: bytes of the weight, by name.
        facts: of the run.
        peaks: GFLOP/s in each round, measured as ``source`` says.
        source: a key of :data:`~.roofline.SOURCES`.
        bandwidth: GB/s.
    """
    first = {entries[name].backend: name for name in reversed(entries)}
    rows = []
    count, size = int(mask.sum()), mask.numel()
    for name, contender in entries.items():
        versus = {
            peer: speedup(times[first[peer]], times[name]) if peer in first else None
            for peer in ("dense", "torch.sparse")
        }
        weights = size if contender.backend.startswith("dense") else count
        work = 2e-9 * weights * case.macs_per_weight
        median = quantile(times[name], 0.5)
        rows.append(
            Row(
                **vars(facts),
                format=case.format,
                product=case.product,
                out_features=case.out_features,
                in_features=case.in_features,
                batch=case.batch,
                sparsity=case.sparsity,
                density=count / size,
                dtype=str(case.dtype).removeprefix("torch."),
                weights=case.weights,
                backend=contender.backend,
                layout=contender.layout,
                median_ms=1e3 * median,
                p20_ms=1e3 * quantile(times[name], 0.2),
                p80_ms=1e3 * quantile(times[name], 0.8),
                speedup_vs_dense=versus["dense"],
                speedup_vs_torch_sparse=versus["torch.sparse"],
                peak_gflops=quantile(peaks, 0.5),
                peak_source=source,
                peak_fraction=quantile(
                    [work / t / peak for t, peak in zip(times[name], peaks, strict=True)], 0.5
                ),
                read_gbs=bandwidth,
                read_fraction=1e-9 * sizes[name] / median / bandwidth,
            )
        )
    return rows


def kernel_seconds(case: Case) -> float | None:
    """An upper bound on the time of the kernel alone, in a float32 CSR forward case on one thread.

    Through ``sparsekern._native``, which adds a call from Python and a new array; None without it.
    """
    native = native_module()
    if native is None:
        return None
    weight = weight_of(case.out_features, case.in_features, case.format, case.sparsity, case.dtype)
    layer = SparseLinear.from_dense(weight.linear, mask=weight.mask, format=case.format)
    pattern = layer.pattern
    assert isinstance(pattern, CSR)
    x, values = inputs_of(case)[0].numpy(), layer.values.detach().numpy()
    arrays = [tensor.numpy() for tensor in pattern.tensors()]
    return quantile(race({"kernel": lambda: native.csr_linear(x, values, arrays)})["kernel"], 0.5)

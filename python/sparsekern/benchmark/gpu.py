"""Measuring on a GPU: captured graphs that are replayed, over copies that overflow its L2 cache.

A replay costs no Python and no launches from the host, so what is timed are the kernels; and a product that
synchronizes or allocates behind torch's back cannot be captured, which is found out here. With ``"cpu"`` as
the device the same steps run as a rehearsal, by the clock in place of graphs and events.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from ..formats import NM, parse_format
from ..isolation import context_lost, first_line, note
from .cases import Case
from .contenders import Contender, Sparsekern
from .results import Row
from .run import Facts, as_rows
from .timing import quantile, race
from .workload import (
    Call,
    call_of,
    check_equal,
    comparable,
    in_layout,
    inputs_of,
    weight_bytes,
    weight_of,
)

OVERFLOW = 3
"""What is rotated over is as many times the L2 cache: at twice it some lines survive a round."""


@dataclass(frozen=True)
class Settings:
    """How cases are measured."""

    device: str
    facts: Facts
    rounds: int
    min_seconds: float


@dataclass
class Measured:
    """What came of a case.

    Attributes:
        rows: a row per contender that ran.
        failures: contender and reason.
        notes: contender and what its figure must be read with.
    """

    rows: list[Row] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)


def measure(case: Case, contenders: Sequence[Contender], settings: Settings) -> Measured:
    """Check and time ``case`` on all ``contenders`` that take it, in turns.

    One that raises, or whose result differs from the dense layer's, is a failure and the others go on. An
    error that leaves a CUDA context in which nothing runs is raised.
    """
    found = Measured()
    watch = _watch(settings.device)
    with watch.running(), torch.set_grad_enabled(case.product != "forward"):
        note("dense")
        kind = parse_format(case.format)
        # The best peer of 2:4 training needs a mask whose transpose is 2:4 too; all get the same one.
        both_ways = kind.kind is NM and (case.out_features % 4, case.in_features % 4) == (0, 0)
        both_ways = both_ways and case.format == "2:4"
        sparsity = None if kind.fixed_sparsity is not None else case.sparsity
        weight = weight_of(
            case.out_features,
            case.in_features,
            case.format,
            sparsity,
            case.dtype,
            settings.device,
            both_ways,
        )
        x, grad = inputs_of(case, settings.device)
        expected = comparable(call_of(weight.linear, case, x, grad)(), weight.linear, weight.mask, case)
        entries: dict[str, Contender] = {}
        calls: dict[str, _Rotation] = {}
        sizes = {}
        for contender in contenders:
            name = f"{contender.backend} {contender.layout}"
            if contender.refuses(case) is not None:
                continue
            note(name)
            try:
                module = weight.module(contender, case)
                sizes[name] = weight_bytes(module)
                touched = sizes[name] + x.nbytes + grad.nbytes
                copies = min(64, max(2, 1 + -(-OVERFLOW * watch.cache_bytes // touched)))
                modules = [module, *(copy.deepcopy(module) for _ in range(copies - 1))]
                turns = [
                    call_of(each, case, *(in_layout(tensor, contender.layout) for tensor in (x, grad)))
                    for each in modules
                ]
                got = turns[0]()
                check_equal(name, comparable(got, module, weight.mask, case), expected, case)
                calls[name] = watch.prepare(turns)
                if remark := calls[name].remark:  # ours must be fit for graphs
                    ours = isinstance(contender, Sparsekern)
                    (found.failures if ours else found.notes).append((name, remark))
                check_equal(
                    f"{name}, replayed",
                    comparable(calls[name].outputs(), module, weight.mask, case),
                    expected,
                    case,
                )
                entries[name] = contender
            except Exception as error:
                calls.pop(name, None)
                if context_lost():
                    raise
                found.failures.append((name, first_line(error)))
                watch.forget()
        note("timing")
        peak = watch.gflops(case.dtype)
        bandwidth = watch.copy_gbs()
        times = race(calls, rounds=settings.rounds, min_seconds=settings.min_seconds, seconds=watch.seconds)
        per_call = {name: [t / calls[name].length for t in times[name]] for name in entries}
        peaks = [peak] * settings.rounds
        found.rows = as_rows(
            case, entries, per_call, weight.mask, sizes, settings.facts, peaks, "matmul", bandwidth
        )
    calls.clear()
    watch.forget()
    return found


@dataclass
class _Rotation:
    """Calls of a contender on one copy after the other, as one."""

    run: Callable[[], object]
    outputs: Callable[[], tuple[Tensor, ...]]
    length: int
    remark: str = ""

    def __call__(self) -> object:
        return self.run()


class Clock:
    """The rehearsal's: the CPU, and its clock."""

    cache_bytes = 0
    side = 256
    copied = 1 << 20

    def __init__(self, device: str) -> None:
        self.device = device

    def running(self) -> contextlib.AbstractContextManager[object]:
        """What all work runs in."""
        return contextlib.nullcontext()

    def prepare(self, turns: Sequence[Call]) -> _Rotation:
        """The calls as one."""

        def run() -> tuple[Tensor, ...]:
            first = turns[0]()
            for call in turns[1:]:
                call()
            return first

        return _Rotation(run, run, len(turns))

    def seconds(self, call: Callable[[], object], repeats: int) -> float:
        """Of one call."""
        start = perf_counter()
        for _ in range(repeats):
            call()
        return (perf_counter() - start) / repeats

    def forget(self) -> None:
        """Give back memory."""

    def gflops(self, dtype: torch.dtype) -> float:
        """Of a dense product in this dtype, now."""
        a = self._ones(dtype, self.side * self.side).view(self.side, self.side)
        return 2e-9 * self.side**3 / self._fastest(lambda: a @ a)

    def copy_gbs(self) -> float:
        """GB/s read and written by a copy, now."""
        source = self._ones(torch.float32, self.copied // 4)
        target = torch.empty_like(source)
        return 2e-9 * source.nbytes / self._fastest(lambda: target.copy_(source))

    @functools.lru_cache(maxsize=4)  # noqa: B019 -- one Clock per process
    def _ones(self, dtype: torch.dtype, size: int) -> Tensor:
        return torch.ones(size, dtype=dtype, device=self.device)

    def _fastest(self, call: Callable[[], Tensor]) -> float:
        with torch.no_grad():
            call()
            return quantile([self.seconds(call, 3) for _ in range(3)], 0.0)


class GraphReplay(Clock):
    """A GPU's: graphs and events, on a stream of its own."""

    side = 8192
    copied = 1 << 30

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.stream = torch.cuda.Stream(device)
        self.cache_bytes = int(torch.cuda.get_device_properties(device).L2_cache_size)

    def running(self) -> contextlib.AbstractContextManager[object]:
        """On the stream that is captured: a backward product runs where its forward one did."""
        return torch.cuda.stream(self.stream)

    def prepare(self, turns: Sequence[Call]) -> _Rotation:
        """The calls as a graph; or one by one, where something in them cannot be captured."""
        eager = super().prepare(turns)
        eager()  # compiles and tunes what does so when it is first called
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                outputs = eager.outputs()
        except RuntimeError as error:
            if context_lost():
                raise
            eager.remark = f"not captured in a graph, timed with its launches: {first_line(error)}"
            return eager

        def replayed() -> tuple[Tensor, ...]:
            for output in outputs:
                output.detach().zero_()  # what a replay must write
            graph.replay()
            return outputs

        return _Rotation(graph.replay, replayed, len(turns))

    def seconds(self, call: Callable[[], object], repeats: int) -> float:
        """Of one call, between events."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return 1e-3 * float(start.elapsed_time(end)) / repeats

    def forget(self) -> None:
        """Give back the memory of graphs and copies."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


@functools.cache
def _watch(device: str) -> Clock:
    return GraphReplay(device) if torch.device(device).type == "cuda" else Clock(device)

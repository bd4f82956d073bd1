"""Running cases: build every contender, hold their results against each other, time them, make rows."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from ..formats import CSR, parse_format
from ..nn import SparseLinear
from . import results
from .cases import Case
from .contenders import Contender
from .results import Row
from .roofline import Roofline, cache_bytes, native_module
from .timing import quantile, race, speedup

Call = Callable[[], tuple[Tensor, ...]]


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
    weight = _weight(case.out_features, case.in_features, case.format, case.sparsity, case.dtype)
    mask = weight.mask
    x, grad = _inputs(case)
    entries = {f"{c.backend} {c.layout}": c for c in contenders if c.refuses(case) is None}
    with torch.set_grad_enabled(case.product != "forward"):
        expected = _comparable(_call(weight.linear, case, x, grad)(), weight.linear, mask, case)
        calls: dict[str, Call] = {}
        weight_bytes = {}
        for name, contender in entries.items():
            module = weight.module(contender, case)
            weight_bytes[name] = _bytes(module)
            copies = 1 + -(-4 * cache_bytes() // weight_bytes[name]) if case.cold else 1
            data = [
                _layout(tensor.to(contender.dtype or case.dtype), contender.layout) for tensor in (x, grad)
            ]
            modules = [module, *(copy.deepcopy(module) for _ in range(copies - 1))]
            calls[name] = _rotate([_call(each, case, *data) for each in modules])
            _check(f"{case}: {name}", _comparable(calls[name](), module, mask, case), expected, case)
        peaks: list[float] = []
        bandwidth = roofline.read_gbs()
        times = race(
            calls,
            rounds=rounds,
            min_seconds=min_seconds,
            before_round=lambda: peaks.append(roofline.gflops()),
        )
    first = {entries[name].backend: name for name in reversed(entries)}
    rows = []
    for name, contender in entries.items():
        versus = {
            peer: speedup(times[first[peer]], times[name]) if peer in first else None
            for peer in ("dense", "torch.sparse")
        }
        weights = mask.numel() if contender.backend.startswith("dense") else int(mask.sum())
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
                density=int(mask.sum()) / mask.numel(),
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
                peak_source=roofline.source,
                peak_fraction=quantile(
                    [work / t / peak for t, peak in zip(times[name], peaks, strict=True)], 0.5
                ),
                read_gbs=bandwidth,
                read_fraction=1e-9 * weight_bytes[name] / median / bandwidth,
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
    weight = _weight(case.out_features, case.in_features, case.format, case.sparsity, case.dtype)
    layer = SparseLinear.from_dense(weight.linear, mask=weight.mask, format=case.format)
    pattern = layer.pattern
    assert isinstance(pattern, CSR)
    x, values = _inputs(case)[0].numpy(), layer.values.detach().numpy()
    arrays = [tensor.numpy() for tensor in pattern.tensors()]
    return quantile(race({"kernel": lambda: native.csr_linear(x, values, arrays)})["kernel"], 0.5)


@dataclass(frozen=True)
class _Weight:
    """The dense layer with its zeros, the mask, and the modules that were made of them."""

    linear: nn.Linear
    mask: Tensor
    modules: dict[object, nn.Module]

    def module(self, contender: Contender, case: Case) -> nn.Module:
        """The contender's module: one for both layouts of x."""
        key = type(contender), contender.backend
        if key not in self.modules:
            self.modules[key] = contender.build(self.linear, self.mask, case)
        return self.modules[key]


@functools.lru_cache(maxsize=1)
def _weight(out_features: int, in_features: int, spec: str, sparsity: float, dtype: torch.dtype) -> _Weight:
    """The same one each time. Consecutive cases share it: indices of 16 million weights take seconds."""
    generator = torch.Generator().manual_seed(0)
    shape = (out_features, in_features)
    mask = parse_format(spec).prune(torch.rand(shape, generator=generator), sparsity)
    linear = nn.Linear(in_features, out_features, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(shape, generator=generator) * mask)
        linear.bias.copy_(torch.randn(out_features, generator=generator))
    return _Weight(linear, mask, {})


def _inputs(case: Case) -> tuple[Tensor, Tensor]:
    """x and the gradient of y; the same ones each time."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(case.batch, case.in_features, generator=generator).to(case.dtype)
    grad = torch.randn(case.batch, case.out_features, generator=generator).to(case.dtype)
    return x, grad


def _layout(tensor: Tensor, layout: str) -> Tensor:
    """A copy of ``tensor [batch, features]`` in this layout."""
    major = tensor.t() if layout == "feature" else tensor
    copied = major.clone(memory_format=torch.contiguous_format)
    return copied.t() if layout == "feature" else copied


def _call(module: nn.Module, case: Case, x: Tensor, grad: Tensor) -> Call:
    """The call to time. A single backward product runs on a graph that was recorded once, and runs alone.

    Only what the product differentiates requires a gradient: a custom autograd function decides in its
    forward which gradients it computes, whichever are asked for later. A training step changes the weight, so
    each forward_backward meets one of a new version: nothing derived from it can be kept.
    """
    bias = [parameter for name, parameter in module.named_parameters() if name == "bias"]
    weight = [parameter for name, parameter in module.named_parameters() if name != "bias"]
    x = x.detach()
    inputs: list[Tensor] = [x, *weight, *bias]
    if case.product == "backward_input":
        inputs = [x]
    elif case.product == "backward_weight":
        inputs = [*weight]
    for tensor in (x, *weight, *bias):
        tensor.requires_grad_(any(tensor is each for each in inputs))
    if case.product in ("forward", "forward_autograd"):
        return lambda: (module(x),)
    if case.product == "forward_backward":

        def step() -> tuple[Tensor, ...]:
            increment_version(weight)
            return torch.autograd.grad(module(x), inputs, grad)

        return step
    y = module(x)
    return lambda: torch.autograd.grad(y, inputs, grad, retain_graph=True)


def _rotate(calls: Sequence[Call]) -> Call:
    if len(calls) == 1:
        return calls[0]
    cycle = itertools.cycle(calls)
    return lambda: next(cycle)()


_READ = {
    "csr": ("row_ptr", "derived.columns"),
    "bsr": ("block_row_ptr", "block_col_idx"),
    "nm": ("packed",),
    "vnm": ("selected", "packed"),
}
"""Which index tensors of a pattern the product with a few rows of x reads, by the format's stem."""


def _bytes(module: nn.Module) -> int:
    """Bytes of the weight: its values, and what says where they are."""
    values = [parameter for name, parameter in module.named_parameters() if name != "bias"]
    index = [buffer for name, buffer in module.named_buffers() if name in ("crow", "col")]
    if isinstance(module, SparseLinear):
        index += [attrgetter(name)(module.pattern) for name in _READ[module.pattern.format]]
    return sum(int(tensor.nbytes) for tensor in (*values, *index))


def _comparable(outputs: tuple[Tensor, ...], module: nn.Module, mask: Tensor, case: Case) -> list[Tensor]:
    """``outputs`` with the gradient of the weight as the list of its numbers at the mask, row by row."""
    tensors = [output.detach() for output in outputs]
    at = {"backward_weight": 0, "forward_backward": 1}.get(case.product)
    if at is not None:
        if isinstance(module, SparseLinear):
            tensors[at] = module.pattern.scatter(tensors[at])
        if tensors[at].dim() == 2:
            tensors[at] = tensors[at][mask]
    return tensors


def _check(name: str, got: list[Tensor], expected: list[Tensor], case: Case) -> None:
    length = max(case.out_features, case.in_features, case.batch)
    tolerance = 4 * (torch.finfo(case.dtype).eps + torch.finfo(torch.float32).eps * length**0.5)
    for a, b in zip(got, expected, strict=True):
        error = float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
        if not error <= tolerance:  # also where it is NaN
            raise RuntimeError(
                f"{name} must equal dense within {tolerance:.1e}, got a difference of {error:.1e}"
            )

"""Running cases: build every contender, hold their results against each other, time them, make rows."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

import torch
from torch import Tensor, nn

from ..formats import CSR, pattern_type
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
    linear, mask, x, grad = _inputs(case)
    entries = {f"{c.backend} {c.layout}": c for c in contenders if c.refuses(case) is None}
    with torch.set_grad_enabled(case.product != "forward"):
        expected = _comparable(_call(linear, case, x, grad)(), mask, case)
        calls: dict[str, Call] = {}
        weight_bytes = {}
        for name, contender in entries.items():
            module = contender.build(linear, mask, case)
            weight_bytes[name] = _bytes(module)
            copies = 1 + -(-4 * cache_bytes() // weight_bytes[name]) if case.cold else 1
            data = [_layout(tensor, contender.layout) for tensor in (x, grad)]
            modules = [module, *(copy.deepcopy(module) for _ in range(copies - 1))]
            calls[name] = _rotate([_call(each, case, *data) for each in modules])
            _check(f"{case}: {name}", _comparable(calls[name](), mask, case), expected, case)
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
        weights = mask.numel() if contender.backend == "dense" else int(mask.sum())
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
    linear, mask, x, _ = _inputs(case)
    layer = SparseLinear.from_dense(linear, mask=mask, format=case.format)
    pattern = layer.pattern
    assert isinstance(pattern, CSR)
    arguments = x.numpy(), layer.values.detach().numpy(), [tensor.numpy() for tensor in pattern.tensors()]
    return quantile(race({"kernel": lambda: native.csr_linear(*arguments)})["kernel"], 0.5)


def _inputs(case: Case) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """The dense layer with its zeros, the mask, x and the gradient of y; the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.out_features, case.in_features)
    kind = pattern_type(case.format)
    mask = kind.prune(torch.rand(shape, generator=generator), case.sparsity)
    linear = nn.Linear(case.in_features, case.out_features, dtype=case.dtype)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(shape, generator=generator) * mask)
        linear.bias.copy_(torch.randn(case.out_features, generator=generator))
    x = torch.randn(case.batch, case.in_features, generator=generator).to(case.dtype)
    grad = torch.randn(case.batch, case.out_features, generator=generator).to(case.dtype)
    return linear, mask, x, grad


def _layout(tensor: Tensor, layout: str) -> Tensor:
    """A copy of ``tensor [batch, features]`` in this layout."""
    major = tensor.t() if layout == "feature" else tensor
    copied = major.clone(memory_format=torch.contiguous_format)
    return copied.t() if layout == "feature" else copied


def _call(module: nn.Module, case: Case, x: Tensor, grad: Tensor) -> Call:
    """The call to time. A single backward product runs on a graph that was recorded once, and runs alone.

    Only what the product differentiates requires a gradient: a custom autograd function decides in its
    forward which gradients it computes, whichever are asked for later.
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
        return lambda: torch.autograd.grad(module(x), inputs, grad)
    y = module(x)
    return lambda: torch.autograd.grad(y, inputs, grad, retain_graph=True)


def _rotate(calls: Sequence[Call]) -> Call:
    if len(calls) == 1:
        return calls[0]
    cycle = itertools.cycle(calls)
    return lambda: next(cycle)()


def _bytes(module: nn.Module) -> int:
    """Bytes of the weight: its values, and what says where they are."""
    values = [parameter for name, parameter in module.named_parameters() if name != "bias"]
    index = [buffer for name, buffer in module.named_buffers() if name in ("crow", "col")]
    if isinstance(module, SparseLinear):
        index += [tensor for _, tensor in module.pattern.state()]
    return sum(int(tensor.nbytes) for tensor in (*values, *index))


def _comparable(outputs: tuple[Tensor, ...], mask: Tensor, case: Case) -> list[Tensor]:
    """``outputs`` with a dense gradient of the weight cut down to the mask."""
    tensors = [output.detach() for output in outputs]
    at = {"backward_weight": 0, "forward_backward": 1}.get(case.product)
    if at is not None and tensors[at].dim() == 2:
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

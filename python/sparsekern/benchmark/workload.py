"""What a case computes with: the weight, the inputs, every contender's module, and the calls to time."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from ..formats import parse_format
from ..nn import SparseLinear
from .cases import Case
from .contenders import Contender

Call = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Weight:
    """The dense layer with its zeros, the mask, and the modules that were made of them."""

    linear: nn.Linear
    mask: Tensor
    modules: dict[object, nn.Module]

    def module(self, contender: Contender, case: Case) -> nn.Module:
        """The contender's module: one for both layouts of x."""
        key = type(contender), contender.backend, contender.variant(case)
        if key not in self.modules:
            self.modules[key] = contender.build(self.linear, self.mask, case)
        return self.modules[key]


@functools.lru_cache(maxsize=1)
def weight_of(
    out_features: int,
    in_features: int,
    spec: str,
    sparsity: float,
    dtype: torch.dtype,
    device: str = "cpu",
    transposable: bool = False,
) -> Weight:
    """The same one each time. Consecutive cases share it: indices of 16 million weights take seconds."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (out_features, in_features)

    def draw(kind: Callable[..., Tensor], *sizes: int) -> Tensor:
        return kind(sizes, generator=generator, device=device)

    mask = parse_format(spec).prune(draw(torch.rand, *shape), sparsity, transposable)
    linear = nn.Linear(in_features, out_features, dtype=dtype, device=device)
    with torch.no_grad():
        linear.weight.copy_(draw(torch.randn, *shape) * mask)
        linear.bias.copy_(draw(torch.randn, out_features))
    return Weight(linear, mask, {})


def inputs_of(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """x and the gradient of y; the same ones each time."""
    generator = torch.Generator(device).manual_seed(1)

    def draw(features: int) -> Tensor:
        return torch.randn(case.batch, features, generator=generator, device=device).to(case.dtype)

    return draw(case.in_features), draw(case.out_features)


def in_layout(tensor: Tensor, layout: str) -> Tensor:
    """A copy of ``tensor [batch, features]`` in this layout."""
    major = tensor.t() if layout == "feature" else tensor
    copied = major.clone(memory_format=torch.contiguous_format)
    return copied.t() if layout == "feature" else copied


def call_of(module: nn.Module, case: Case, x: Tensor, grad: Tensor) -> Call:
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


def rotate(calls: Sequence[Call]) -> Call:
    """One call after the other, round and round."""
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

_READ_ON_GPU = {**_READ, "csr": ("row_ptr", "col_idx"), "vnm": ("columns", "packed")}


def weight_bytes(module: nn.Module) -> int:
    """Bytes of the weight: its values, and what says where they are."""
    if isinstance(own := getattr(module, "weight_bytes", None), int):  # a peer's own storage
        return own
    values = [parameter for name, parameter in module.named_parameters() if name != "bias"]
    index = [buffer for name, buffer in module.named_buffers() if name in ("crow", "col")]
    if isinstance(module, SparseLinear):
        read = _READ if module.pattern.device.type == "cpu" else _READ_ON_GPU
        index += [attrgetter(name)(module.pattern) for name in read[module.pattern.format]]
    return sum(int(tensor.nbytes) for tensor in (*values, *index))


def comparable(outputs: tuple[Tensor, ...], module: nn.Module, mask: Tensor, case: Case) -> list[Tensor]:
    """``outputs`` with the gradient of the weight as the list of its numbers at the mask, row by row."""
    tensors = [output.detach() for output in outputs]
    at = {"backward_weight": 0, "forward_backward": 1}.get(case.product)
    if at is not None:
        if isinstance(module, SparseLinear):
            tensors[at] = module.pattern.scatter(tensors[at])
        if tensors[at].dim() == 2:
            tensors[at] = tensors[at][mask]
    return tensors


def check_equal(name: str, got: list[Tensor], expected: list[Tensor], case: Case) -> None:
    """Raise ``RuntimeError`` where results differ by more than rounding to the case's dtype explains."""
    length = max(case.out_features, case.in_features, case.batch)
    tolerance = 4 * (torch.finfo(case.dtype).eps + torch.finfo(torch.float32).eps * length**0.5)
    for a, b in zip(got, expected, strict=True):
        error = float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
        if not error <= tolerance:  # also where it is NaN
            raise RuntimeError(
                f"{name} must equal dense within {tolerance:.1e}, got a difference of {error:.1e}"
            )

"""Who is measured: the same weight and bias in each library's own layer, fed the layout that suits it best.

A contender builds a module from ``[batch, in]`` to ``[batch, out]`` whose only parameter besides ``bias`` is
its weight; :mod:`.run` times every product of it through autograd. Subclass :class:`Contender` for others.
"""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._library import LOAD_ERROR
from ..formats import parse_format
from ..formats.triton_products import missing
from ..nn import SparseLinear
from .cases import Case, Suite

LAYOUTS = ("batch", "feature")
"""Batch-major, strides (features, 1), and feature-major, strides (1, batch)."""


class Contender(ABC):
    """One way to compute a case.

    Attributes:
        backend: its name in the results.
        layout: of x and of the gradient of y, one of :data:`LAYOUTS`.
        dtype: of all it computes with, where that is not the case's.
    """

    backend: str
    layout: str = "batch"
    dtype: torch.dtype | None = None

    def refuses(self, case: Case) -> str | None:
        """Why it cannot run ``case``, or None."""
        return None

    def variant(self, case: Case) -> object:
        """What its module depends on beside the weight: nothing, unless overridden."""
        return None

    @abstractmethod
    def build(self, linear: nn.Linear, mask: Tensor, case: Case) -> nn.Module:
        """The module that equals ``linear``, whose weight is 0 where the bool ``mask [out, in]`` is False."""


class Sparsekern(Contender):
    """:class:`sparsekern.SparseLinear` of the case's format: native, in Triton, or as ``"auto"`` chooses."""

    def __init__(self, layout: str, backend: str = "native") -> None:
        self.layout = layout
        self.backend = "reference" if backend == "native" and LOAD_ERROR is not None else backend

    def refuses(self, case: Case) -> str | None:
        """Why Triton cannot run it, where that is asked for."""
        if self.backend != "triton":
            return None
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        reason: str | None = missing(parse_format(case.format).kind.format, kind)
        return reason

    def build(self, linear: nn.Linear, mask: Tensor, case: Case) -> nn.Module:
        """A ``SparseLinear`` that runs this backend only."""
        layer = SparseLinear.from_dense(linear, mask=mask, format=case.format)
        layer.backend = self.backend
        return layer


class Dense(Contender):
    """``torch.nn.Linear``."""

    backend = "dense"

    def build(self, linear: nn.Linear, mask: Tensor, case: Case) -> nn.Module:
        """The layer itself: its zeros cost what other weights do."""
        return linear


class DenseFloat32(Contender):
    """``torch.nn.Linear`` in float32, beside narrower cases: on many CPUs it is the faster dense layer."""

    backend = "dense float32"
    dtype = torch.float32

    def build(self, linear: nn.Linear, mask: Tensor, case: Case) -> nn.Module:
        """A copy in float32."""
        return copy.deepcopy(linear).float()


class TorchSparse(Contender):
    """``torch.sparse`` CSR, put together as well as its functions allow: see :class:`TorchSparseLinear`."""

    backend = "torch.sparse"
    layout = "feature"

    def refuses(self, case: Case) -> str | None:
        """MKL's sparse products know no bfloat16, and there are none for other formats."""
        if case.format != "csr":
            return "measured for CSR only"
        return None if case.dtype == torch.float32 else "its products take float32 and float64"

    def build(self, linear: nn.Linear, mask: Tensor, case: Case) -> nn.Module:
        """A layer of CSR products."""
        return TorchSparseLinear(linear, mask)


OURS: tuple[Contender, ...] = tuple(Sparsekern(layout) for layout in LAYOUTS)
PEERS: tuple[Contender, ...] = (Dense(), TorchSparse())


def line_up(suite: Suite, case: Case, extra: Sequence[Contender] = ()) -> tuple[Contender, ...]:
    """Who measures ``case`` in ``suite``; ``extra`` peers join where it has others than dense torch."""
    ours = tuple(Sparsekern(layout, backend) for backend, layout in suite.ours)
    narrow = () if case.dtype == torch.float32 else (DenseFloat32(),)
    return (*ours, Dense(), *narrow, *(() if suite.only_dense else (TorchSparse(), *extra)))


class TorchSparseLinear(nn.Module):
    """The best layer that ``torch.sparse`` gives on a CPU.

    int32 indices, which MKL takes as they are; x feature-major; one vector through ``addmv``, twice as fast
    as ``addmm``. Its own autograd transposes W in each backward (2.2x the time of a product with a stored
    transpose, 1024x1024 at 80 and 95 %), and ``torch.mm`` gives a dense gradient of W; so backward here uses
    a stored transpose, whose values are gathered anew, and ``sampled_addmm``.
    """

    crow: Tensor
    col: Tensor
    crow_t: Tensor
    col_t: Tensor
    perm: Tensor

    def __init__(self, linear: nn.Linear, mask: Tensor) -> None:
        super().__init__()
        flat = torch.arange(mask.numel(), device=mask.device).view_as(mask)[mask]  # position of each value
        rows, cols = flat // mask.shape[1], flat % mask.shape[1]
        perm = torch.argsort(cols, stable=True)
        self.register_buffer("crow", _pointers(rows, mask.shape[0]))
        self.register_buffer("col", cols.int())
        self.register_buffer("crow_t", _pointers(cols, mask.shape[1]))
        self.register_buffer("col_t", rows[perm].int())
        self.register_buffer("perm", perm)
        self.shape = (mask.shape[0], mask.shape[1])
        self.values = nn.Parameter(linear.weight.detach()[mask])
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            self.weight(self.values)  # torch warns once, at the first one

    def weight(self, values: Tensor) -> Tensor:
        """W, of values."""
        return torch.sparse_csr_tensor(self.crow, self.col, values, self.shape, check_invariants=False)

    def transposed_weight(self, values: Tensor) -> Tensor:
        """Wᵀ, of W's values."""
        shape = (self.shape[1], self.shape[0])
        return torch.sparse_csr_tensor(
            self.crow_t, self.col_t, values[self.perm], shape, check_invariants=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """``y = x Wᵀ + b``."""
        y: Tensor = _TorchSparseFunction.apply(x, self.values, self.bias, self)  # type: ignore[no-untyped-call]
        return y


class _TorchSparseFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, layer: TorchSparseLinear) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.layer = layer
        weight = layer.weight(values)
        if bias is None:
            return torch.mm(weight, x.t()).t()
        if x.shape[0] == 1:
            return torch.addmv(bias, weight, x[0])[None]
        return torch.addmm(bias[:, None], weight, x.t()).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (grad,) = grads
        x, values = ctx.saved_tensors
        need_x, need_values, need_bias, _ = ctx.needs_input_grad
        grad_x = torch.mm(ctx.layer.transposed_weight(values), grad.t()).t() if need_x else None
        grad_values = None
        if need_values:
            grad_values = torch.sparse.sampled_addmm(ctx.layer.weight(values), grad.t(), x, beta=0).values()
        return grad_x, grad_values, grad.sum(0) if need_bias else None, None


def _pointers(index: Tensor, size: int) -> Tensor:
    counts = torch.bincount(index, minlength=size)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()


def refusals(plan: Iterable[tuple[Case, Sequence[Contender]]]) -> list[str]:
    """One line per contender that sits out some of the cases, and why."""
    reasons = {
        f"{c.backend}: {reason}" for case, joined in plan for c in joined if (reason := c.refuses(case))
    }
    return sorted(reasons)

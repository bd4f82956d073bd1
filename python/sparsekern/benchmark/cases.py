"""What is measured: one product of one weight at one sparsity, and the suites of such cases."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..formats import parse_format

PRODUCTS = {
    "forward": "y = x Wᵀ + b under no_grad",
    "backward_input": "dx = g W",
    "backward_weight": "dW = gᵀ x, where W has a value",
    "forward_backward": "a layer's share of a training step: y, then dx, dW and db through autograd",
    "forward_autograd": "y = x Wᵀ + b while autograd records",
}


@dataclass(frozen=True)
class Case:
    """One product of ``W [out, in]`` with a batch, for every contender.

    ``cold`` rotates over copies of the weight that overflow the last-level cache, as the layers of a decoding
    network do; otherwise the same tensors are used again and again, and small weights stay in the cache.
    """

    out_features: int
    in_features: int
    batch: int
    sparsity: float
    product: str = "forward"
    dtype: torch.dtype = torch.float32
    cold: bool = False
    format: str = "csr"

    @property
    def weights(self) -> str:
        """``"warm"`` or ``"cold"``, as the results say it."""
        return "cold" if self.cold else "warm"

    @property
    def macs_per_weight(self) -> int:
        """Multiply-adds per nonzero: one per batch element and product."""
        return self.batch * (3 if self.product == "forward_backward" else 1)

    def __str__(self) -> str:
        size = f"{self.out_features}x{self.in_features}x{self.batch}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.product} {self.format} {size} {100 * self.sparsity:g}% {dtype} {self.weights}"


Shape = tuple[int, int, int]
"""``(out_features, in_features, batch)``."""


@dataclass(frozen=True)
class Suite:
    """The cases that are the product of these lists.

    Attributes:
        formats: the sparsities of each format; none where the format fixes its own.
        ours: backend and layout of x of each :class:`~.contenders.Sparsekern` that takes part.
        only_dense: whether dense torch is the only peer.
        max_macs: dense products of more multiply-adds are left out, but for shapes that were asked for.
        every: of the suite as it is, each so many-th case. Where it has no factor in common with the lengths
            of the lists, all pairs of their members come.
    """

    about: str
    shapes: tuple[Shape, ...]
    formats: Mapping[str, tuple[float, ...]]
    products: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    cold: tuple[bool, ...] = (False,)
    ours: tuple[tuple[str, str], ...] = (("native", "batch"), ("native", "feature"))
    only_dense: bool = False
    max_macs: float = math.inf
    every: int = 1

    def cases(
        self,
        *,
        shapes: Sequence[Shape] | None = None,
        formats: Sequence[str] | None = None,
        sparsities: Sequence[float] | None = None,
        products: Sequence[str] | None = None,
        dtypes: Sequence[torch.dtype] | None = None,
    ) -> Iterator[Case]:
        """The suite's cases, with any of its lists replaced. Those of one weight follow each other.

        A format that fixes its sparsity keeps it; one that the suite has not takes those of its first.
        """
        every = 1 if shapes or formats or sparsities or products or dtypes else self.every
        weights = [
            (spec, sparsity)
            for spec in formats or self.formats
            for sparsity in self._sparsities(spec, sparsities)
        ]
        lists = (dtypes or self.dtypes, weights, shapes or self.shapes, products or self.products, self.cold)
        for dtype, (spec, sparsity), shape, product, cold in itertools.islice(
            itertools.product(*lists), 0, None, every
        ):
            case = Case(*shape, sparsity, product, dtype, cold, spec)
            if shapes or shape[0] * shape[1] * case.macs_per_weight <= self.max_macs:
                yield case

    def _sparsities(self, spec: str, asked: Sequence[float] | None) -> Sequence[float]:
        fixed = parse_format(spec).fixed_sparsity
        if fixed is not None:
            return (fixed,)
        return asked or self.formats.get(spec) or next(iter(self.formats.values()))


_FIXED = ()
_LAYERS = ((4096, 1024, 256), (1024, 1024, 1024), (768, 3072, 128), (3072, 768, 1024))

SUITES = {
    "layers": Suite(
        "training-sized layers, each product alone and a training step's share",
        shapes=_LAYERS,
        formats={
            "csr": (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98),
            **dict.fromkeys(("bsr16", "bsr32", "bsr64"), (0.5, 0.8, 0.9, 0.95)),
            **dict.fromkeys(("2:4", "2:8", "64:2:8", "64:2:16"), _FIXED),
        },
        products=("forward", "backward_input", "backward_weight", "forward_backward"),
    ),
    "decode": Suite(
        "one big weight, a few rows of x: bound by the bytes of the weight",
        shapes=tuple((4096, 4096, batch) for batch in (1, 2, 4, 8)),
        formats={"csr": (0.8, 0.9, 0.95), "2:4": _FIXED, "64:2:8": _FIXED, "bsr32": (0.9,)},
        products=("forward",),
        dtypes=(torch.float32, torch.bfloat16),
        cold=(False, True),
        ours=(("native", "batch"),),
    ),
    "overhead": Suite(
        "a layer so small that the call itself is what is timed",
        shapes=((64, 64, 1),),
        formats={"csr": (0.9,)},
        products=("forward", "forward_autograd"),
    ),
    "auto": Suite(
        'backend="auto" against dense at 1 to 100 % density, 1 to 4096 rows of x: the worst case of a sample',
        shapes=tuple(
            (*weight, batch)
            for weight in (*((out, inner) for out, inner, _ in _LAYERS), (4096, 4096))
            for batch in (1, 4, 16, 64, 256, 1024, 4096)
        ),
        formats={
            "csr": (0.99, 0.9, 0.8, 0.65, 0.5, 0.3, 0.0),
            **dict.fromkeys(("bsr16", "bsr32"), (0.95, 0.5, 0.0)),
            **dict.fromkeys(("2:4", "2:8", "64:2:8"), _FIXED),
        },
        products=("forward", "forward_backward"),
        dtypes=(torch.float32, torch.bfloat16),
        ours=(("auto", "batch"),),
        only_dense=True,
        max_macs=2.5e10,  # 0.3 s at 170 GFLOP/s
        every=11,
    ),
}

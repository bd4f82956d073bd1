"""What is measured: one product of one weight at one sparsity, and the suites of such cases."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

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
        return f"{self.product} {size} {100 * self.sparsity:g}% {self.weights}"


Shape = tuple[int, int, int]
"""``(out_features, in_features, batch)``."""


@dataclass(frozen=True)
class Suite:
    """The cases that are the product of these lists."""

    about: str
    shapes: tuple[Shape, ...]
    sparsities: tuple[float, ...]
    products: tuple[str, ...]
    cold: tuple[bool, ...] = (False,)

    def cases(
        self,
        *,
        shapes: Sequence[Shape] | None = None,
        sparsities: Sequence[float] | None = None,
        products: Sequence[str] | None = None,
        dtypes: Sequence[torch.dtype] = (torch.float32,),
        formats: Sequence[str] = ("csr",),
    ) -> Iterator[Case]:
        """The suite's cases, with any of its lists replaced."""
        for format, dtype, product, cold, shape, sparsity in itertools.product(
            formats,
            dtypes,
            products or self.products,
            self.cold,
            shapes or self.shapes,
            sparsities or self.sparsities,
        ):
            yield Case(*shape, sparsity, product, dtype, cold, format)


SUITES = {
    "layers": Suite(
        "training-sized layers, each product alone and a training step's share",
        shapes=((4096, 1024, 256), (1024, 1024, 1024), (768, 3072, 128), (3072, 768, 1024)),
        sparsities=(0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98),
        products=("forward", "backward_input", "backward_weight", "forward_backward"),
    ),
    "decode": Suite(
        "one big weight, a few rows of x: bound by the bytes of the weight",
        shapes=((4096, 4096, 1), (4096, 4096, 2), (4096, 4096, 4), (4096, 4096, 8)),
        sparsities=(0.8, 0.9, 0.95),
        products=("forward",),
        cold=(False, True),
    ),
    "overhead": Suite(
        "a layer so small that the call itself is what is timed",
        shapes=((64, 64, 1),),
        sparsities=(0.9,),
        products=("forward", "forward_autograd"),
    ),
}

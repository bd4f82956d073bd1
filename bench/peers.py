"""Optional peers: other libraries' layers, measured where they are installed. See README.md for how."""

from __future__ import annotations

import importlib.util

import torch
from sparsekern.benchmark import Case, Contender
from torch import Tensor, nn


class SparseProp(Contender):
    """The SparseProp layer (Nikdan et al. 2023, PyPI ``sparseprop`` 0.1.14).

    It takes batch-major float32 and transposes inside, 16x16 where batch and features are multiples of 16.
    Its backward always computes both gradients, so it sits out the single backward products. Its OpenMP is
    the runtime that torch loaded, so torch's thread count is its too.
    """

    backend = "sparseprop"
    layout = "batch"

    def refuses(self, case: Case) -> str | None:
        if case.format != "csr":
            return "unstructured sparsity only"
        if case.dtype != torch.float32:
            return "float32 only"
        if case.product in ("backward_input", "backward_weight"):
            return "its backward computes both gradients at once"
        return None

    def build(self, linear: nn.Linear, mask: Tensor, case: Case) -> nn.Module:
        from sparseprop.modules import SparseLinear  # type: ignore[import-untyped,import-not-found,unused-ignore]

        layer: nn.Module = SparseLinear.from_dense(linear)
        return layer


def installed() -> tuple[Contender, ...]:
    """The peers that can be imported here."""
    return (SparseProp(),) if importlib.util.find_spec("sparseprop") is not None else ()

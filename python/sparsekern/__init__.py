"""Weight-sparse neural networks that are really cheaper to train and to run."""

from . import training
from ._version import __version__
from .formats import BSR, CSR, NM, VNM, Pattern, prune
from .nn import SparseLinear, densify, sparsify, summary
from .ops import linear

__all__ = [
    "BSR",
    "CSR",
    "NM",
    "VNM",
    "Pattern",
    "SparseLinear",
    "__version__",
    "densify",
    "linear",
    "prune",
    "sparsify",
    "summary",
    "training",
]

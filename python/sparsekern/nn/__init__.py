"""Sparse layers."""

from .convert import densify, sparsify, summary
from .linear import SparseLinear

__all__ = ["SparseLinear", "densify", "sparsify", "summary"]

"""Sparse layers."""

from .convert import densify, sparsify
from .linear import SparseLinear
from .summary import summary

__all__ = ["SparseLinear", "densify", "sparsify", "summary"]

"""The sparsity formats: one file each, found by their spec string."""

from __future__ import annotations

from torch import Tensor

from .csr import CSR
from .pattern import Pattern

__all__ = ["CSR", "Pattern", "pattern_type", "prune"]

_FORMATS: dict[str, type[Pattern]] = {CSR.format: CSR}


def pattern_type(format: str) -> type[Pattern]:
    """The pattern class of a spec string such as ``"csr"``. Raises ``ValueError`` for an unknown one."""
    if format not in _FORMATS:
        raise ValueError(f"format must be one of {sorted(_FORMATS)}, got {format!r}")
    return _FORMATS[format]


def prune(weight: Tensor, sparsity: float, format: str = "csr") -> Tensor:
    """The best mask of a format by magnitude: the one that keeps the largest ``Σ |weight|``.

    Args:
        weight: ``[out, in]``: a weight, or any scores whose magnitude says what is worth keeping.
        sparsity: fraction of zeros, in [0, 1).
        format: the sparsity format, ``"csr"``: keeps the ``round(out · in · (1 − sparsity))`` largest, ties
            to the lower index.

    Returns:
        Bool ``[out, in]``, True where a weight stays.

    Raises:
        ValueError: an unknown format, a sparsity outside [0, 1), a weight that is not a matrix or holds NaN.

    >>> mask = prune(torch.randn(64, 32), 0.9)
    """
    if weight.dim() != 2:
        raise ValueError(f"weight must be a matrix [out, in], got shape {list(weight.shape)}")
    return pattern_type(format).prune(weight.detach().abs(), sparsity)

"""The sparsity formats: one file each, found by their spec string."""

from __future__ import annotations

from .csr import CSR
from .pattern import Pattern

__all__ = ["CSR", "Pattern", "pattern_type"]

_FORMATS: dict[str, type[Pattern]] = {CSR.format: CSR}


def pattern_type(format: str) -> type[Pattern]:
    """The pattern class of a spec string such as ``"csr"``. Raises ``ValueError`` for an unknown one."""
    if format not in _FORMATS:
        raise ValueError(f"format must be one of {sorted(_FORMATS)}, got {format!r}")
    return _FORMATS[format]

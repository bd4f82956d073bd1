"""The sparsity formats: one file each, found by their spec string."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .bsr import BSR, SIDES, check_block
from .csr import CSR
from .nm import NM, check_nm
from .pattern import Pattern
from .vnm import VNM, check_vnm

__all__ = ["BSR", "CSR", "NM", "VNM", "Format", "Pattern", "parse_format", "prune"]


@dataclass(frozen=True)
class Format:
    """A sparsity format with its options, e.g. 2:4: what a spec string says.

    Attributes:
        kind: the pattern class.
        options: what its classmethods take beside the mask, state or scores, e.g. ``{"n": 2, "m": 4}``.
    """

    kind: type[Pattern]
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def from_mask(self, mask: Tensor) -> Pattern:
        """The pattern of a bool mask ``[out, in]``. Raises ``ValueError`` where it does not fit."""
        return self.kind.from_mask(mask, **self.options)

    def from_state(self, shape: tuple[int, int], state: dict[str, Tensor]) -> Pattern:
        """The pattern of primary index tensors, checked completely. Raises ``ValueError`` on bad contents."""
        return self.kind.from_state(shape, state, **self.options)

    def prune(self, scores: Tensor, sparsity: float | None = None) -> Tensor:
        """The bool mask of this format with the largest sum of ``scores [out, in]`` at ``sparsity``.

        None where the format fixes it.
        """
        return self.kind.prune(scores, sparsity, **self.options)

    def random_mask(
        self, shape: tuple[int, int], sparsity: float | None, generator: torch.Generator | None = None
    ) -> Tensor:
        """A random bool mask of this format, on the CPU, that keeps as much as :meth:`prune` does."""
        return self.prune(self.kind.random_scores(shape, generator, **self.options), sparsity)

    @property
    def fixed_sparsity(self) -> float | None:
        """The sparsity of every pattern of this format, e.g. ½ for 2:4; None where it is free."""
        return self.kind.fixed_sparsity(**self.options)

    @property
    def spec(self) -> str:
        """The spec string in its shortest form: ``"bsr32"`` for ``"bsr32x32"``."""
        # Patterns know how to write it: ask an empty one.
        return self.from_mask(torch.zeros((0, 0), dtype=torch.bool, device="cpu")).spec


def _block(height: int, width: int | None = None) -> dict[str, Any]:
    return {"block": check_block((height, height if width is None else width))}


def _nm(n: int, m: int) -> dict[str, Any]:
    check_nm(n, m)
    return {"n": n, "m": m}


def _vnm(v: int, n: int, m: int) -> dict[str, Any]:
    check_vnm(v, n, m)
    return {"v": v, "n": n, "m": m}


_INT = "([1-9][0-9]{0,9})"
_SPECS: tuple[tuple[str, type[Pattern], Callable[..., dict[str, Any]]], ...] = (
    ("csr", CSR, dict),
    (f"bsr{_INT}(?:x{_INT})?", BSR, _block),
    (f"{_INT}:{_INT}", NM, _nm),
    (f"{_INT}:{_INT}:{_INT}", VNM, _vnm),
)


def parse_format(spec: str) -> Format:
    """The format that a spec string names.

    Args:
        spec: one of

            * ``"csr"``;
            * ``"bsr32"`` (square blocks) or ``"bsr64x32"`` (height x width), sides 4, 8, 16, 32, 64 or 128;
            * ``"N:M"``, e.g. ``"2:4"``, with ``1 ≤ N ≤ M ≤ 16``;
            * ``"V:2:M"``, e.g. ``"64:2:8"``, with V a multiple of 4 and ``4 ≤ M ≤ 256``.

    Raises:
        ValueError: any other.

    >>> parse_format("2:4").fixed_sparsity
    0.5
    """
    try:
        for pattern, kind, options in _SPECS:
            if match := re.fullmatch(pattern, spec):
                return Format(kind, options(*(int(size) for size in match.groups() if size is not None)))
    except (TypeError, ValueError):  # no string; a size that the format has not
        pass
    raise ValueError(
        f"format must be 'csr', 'bsr<side>' or 'bsr<height>x<width>' with sides from {SIDES}, 'N:M' with "
        f"1 <= N <= M <= 16, or 'V:2:M' with V a multiple of 4 and 4 <= M <= 256, got {spec!r}"
    )


def prune(weight: Tensor, sparsity: float | None = None, format: str = "csr") -> Tensor:
    """The best mask of a format by magnitude: the one that keeps the largest ``Σ |weight|``.

    Ties go to the lower index.

    Args:
        weight: ``[out, in]``: a weight, or any scores whose magnitude says what is worth keeping.
        sparsity: fraction of zeros, in [0, 1). N:M and V:N:M fix it, at ``1 − N/M``, and take None.
        format: the spec string of the sparsity format, see :func:`parse_format`.

            * ``"csr"``: the ``round(out · in · (1 − sparsity))`` largest weights.
            * ``"bsr32"``: the ``round(blocks · (1 − sparsity))`` blocks with the largest ``Σ |weight|``.
            * ``"2:4"``: the N largest of each group.
            * ``"64:2:8"``: the 4 columns of each V × M tile that keep most, and the 2 largest of each row in
              them; for ``M > 8`` not always the best, see :meth:`VNM.prune`.

    Returns:
        Bool ``[out, in]``, True where a weight stays.

    Raises:
        ValueError: an unknown format, a sparsity outside [0, 1) or not the format's, a weight that is not a
            matrix or holds NaN, or infinities where sums are compared (blocks and V:N:M).

    >>> mask = prune(torch.randn(64, 32), 0.9)
    """
    if weight.dim() != 2:
        raise ValueError(f"weight must be a matrix [out, in], got shape {list(weight.shape)}")
    return parse_format(format).prune(weight.detach().abs(), sparsity)

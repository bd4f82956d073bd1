"""The sparsity formats: one file each, found by their spec string."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .bsr import BSR, SIDES, check_block
from .checks import as_scores
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

    def prune(self, scores: Tensor, sparsity: float | None = None, transposable: bool = False) -> Tensor:
        """The bool mask of this format with the largest sum of ``scores [out, in]`` at ``sparsity``.

        None where the format fixes it. If ``transposable``, the best of those whose transpose fits too.
        """
        if not transposable:
            return self.kind.prune(scores, sparsity, **self.options)
        if not issubclass(self.kind, NM):
            raise ValueError(f"format must be 'N:M' where transposable, got {self.spec!r}")
        return self.kind.prune_transposable(scores, sparsity=sparsity, **self.options)

    def pruned(self, weight: Tensor, sparsity: float | None = None, transposable: bool = False) -> Pattern:
        """The pattern of the best mask by magnitude. Raises ``ValueError`` where it keeps nothing."""
        mask = self.prune(as_scores("weight", weight).abs(), sparsity, transposable)
        return self._check_alive(self.from_mask(mask), sparsity)

    def random(
        self, shape: tuple[int, int], sparsity: float | None, generator: torch.Generator | None = None
    ) -> Pattern:
        """A random pattern, on the CPU, that keeps as much as :meth:`prune` does. O(nnz) memory.

        Raises ``ValueError`` where it keeps nothing.
        """
        return self._check_alive(self.kind.random(shape, sparsity, generator, **self.options), sparsity)

    def _check_alive(self, pattern: Pattern, sparsity: float | None) -> Pattern:
        """Nobody who asks for a sparsity below 1 wants a layer that computes nothing."""
        count, parts = self.kind.parts(pattern.shape, **self.options)
        if count and not pattern.nnz:
            raise ValueError(
                f"sparsity must be at most {1.0 - 1.0 / count:.9g} to keep one of {count} {parts}, "
                f"got {sparsity}: leave so small a layer dense (exclude=...), or take a finer format"
            )
        return pattern

    @property
    def fixed_sparsity(self) -> float | None:
        """The sparsity of every pattern of this format, e.g. ½ for 2:4; None where it is free."""
        return self.kind.fixed_sparsity(**self.options)

    @property
    def spec(self) -> str:
        """The spec string in its shortest form: ``"bsr32"`` for ``"bsr32x32"``."""
        return self.kind.spec_of(**self.options)


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


def prune(
    weight: Tensor, sparsity: float | None = None, format: str = "csr", *, transposable: bool = False
) -> Tensor:
    """The best mask of a format by magnitude: the one that keeps the largest ``Σ |weight|``.

    Ties go to the lower index.

    Args:
        weight: ``[out, in]`` of a float dtype of 16 bits or more, or integers: a weight, or any scores whose
            magnitude says what is worth keeping.
        sparsity: fraction of zeros, in [0, 1). N:M and V:N:M fix it, at ``1 − N/M``, and take None.
        format: the spec string of the sparsity format, see :func:`parse_format`.

            * ``"csr"``: the ``round(out · in · (1 − sparsity))`` largest weights.
            * ``"bsr32"``: the ``round(blocks · (1 − sparsity))`` blocks with the largest ``Σ |weight|``.
            * ``"2:4"``: the N largest of each group.
            * ``"64:2:8"``: the 4 columns of each V × M tile that keep most, and the 2 largest of each row in
              them; for ``M > 8`` not always the best, see :meth:`VNM.prune`.

        transposable: the best N:M mask whose transpose is N:M too, see :meth:`NM.prune_transposable`; M must
            divide both sizes. For N:M only.

    Returns:
        Bool ``[out, in]``, True where a weight stays.

    Raises:
        TypeError: a weight that is no tensor, a sparsity that is no number.
        ValueError: an unknown format, a sparsity outside [0, 1) or not the format's, a weight that is not a
            dense real matrix or holds NaN, or infinities where sums are compared (blocks, V:N:M and
            transposable masks); a transposable mask of another format than N:M, or of sizes that M does not
            divide.

    >>> mask = prune(torch.randn(64, 32), 0.9)
    >>> mask = prune(torch.randn(64, 32), format="2:4", transposable=True)
    """
    return parse_format(format).prune(as_scores("weight", weight).abs(), sparsity, transposable)

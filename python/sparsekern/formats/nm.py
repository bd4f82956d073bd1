"""N:M sparsity: N values in each group of M consecutive columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import check_fixed_sparsity, check_nnz, check_scores, check_shape, check_tensor
from .groups import (
    GroupPattern,
    check_group_counts,
    check_positions,
    pack,
    row_values,
    top_of_groups,
)
from .metadata import Metadata
from .pattern import check_mask
from .sampling import sample_groups
from .transposable import transposable_mask


class NM(GroupPattern):
    """A pattern with exactly N values in each group of M columns of each row, ``1 ≤ N ≤ M ≤ 16``.

    Args:
        shape: ``(out_features, in_features)``. Where M does not divide ``in``, the last group has the
            ``c = in % M`` columns that are left and holds ``min(N, c)`` values.
        index: uint8 ``[out, in·N/M]``, exactly ``[out, in // M · N + min(N, in % M)]``: the position of each
            value in its group, strictly ascending within the group.
        n, m: N and M.

    Raises:
        ValueError: wrong dtype, shape or contents; the message names the tensor, the rule and what was found.

    The values have the shape of ``index``. Derived when built, for the kernels: ``packed``, uint8
    ``[out, bytes]``, the positions in 2 bits each where ``M ≤ 4``, else 4, the first one lowest, rows padded
    to a multiple of 4 bytes; and :class:`~sparsekern.formats.csr.Tiles`, on GPUs
    :class:`~sparsekern.formats.metadata.Metadata`.
    """

    format = "nm"
    state_names = ("index",)

    def __init__(self, shape: tuple[int, int], index: Tensor, n: int, m: int) -> None:
        self.shape = check_shape(shape)
        self.n, self.m = check_nm(n, m)
        out_features, in_features = self.shape
        row_nnz = row_values(in_features, n, m)
        check_nnz(out_features * row_nnz, self.shape)
        check_tensor("index", index, torch.uint8, (out_features, row_nnz))
        if index.device.type != "meta":
            check_positions("index", index, n, m, in_features % m, in_features // m, "row")
        self.index = index
        self.packed = pack(index, bits=2 if m <= 4 else 4)
        self._derive()

    def _columns(self) -> Tensor:
        groups = torch.arange(self.index.shape[1], dtype=torch.int32, device=self.device) // self.n
        return groups * self.m + self.index

    def metadata(self) -> Metadata:
        """What sparse tensor cores are told of it; nothing where they cannot run it."""
        return Metadata.build(self.index, self.n, self.m, self.shape[1])

    @classmethod
    def from_mask(cls, mask: Tensor, n: int, m: int) -> NM:
        """The pattern of a bool mask ``[out, in]`` that holds exactly N in each group of M.

        Raises:
            ValueError: a group that holds another number; the message names its row, its columns and the
                number.
        """
        check_mask(mask)
        shape, (n, m) = check_shape((mask.shape[0], mask.shape[1])), check_nm(n, m)
        check_nnz(shape[0] * row_values(shape[1], n, m), shape)
        check_group_counts(mask, n, m)
        positions = mask.nonzero()[:, 1].remainder_(m).to(torch.uint8)
        return cls(shape, positions.view(shape[0], row_values(shape[1], n, m)), n, m)

    @classmethod
    def from_state(cls, shape: tuple[int, int], state: dict[str, Tensor], n: int, m: int) -> NM:
        """The pattern of ``index``, checked completely. Raises as the class does."""
        return cls(shape, state["index"], n, m)

    @classmethod
    def prune(cls, scores: Tensor, sparsity: float | None, n: int, m: int) -> Tensor:
        """Bool mask of the N largest ``scores`` of each group, ties to the lower column.

        Raises:
            ValueError: scores that are no matrix or hold NaN; a sparsity that is not ``1 − N/M``; bad N or M.
        """
        fixed = cls.fixed_sparsity(n, m)
        scores = check_scores(scores)
        check_fixed_sparsity(sparsity, fixed, cls.spec_of(n, m))
        return top_of_groups(scores, n, m)

    @classmethod
    def prune_transposable(cls, scores: Tensor, n: int, m: int, sparsity: float | None = None) -> Tensor:
        """The N:M mask with the largest sum of ``scores`` that is N:M along the columns as well.

        W and its transpose then both run as N:M (Hubara et al., "Accelerated Sparse Neural Training: A
        Provable and Efficient Method to Find N:M Transposable Masks", 2021). M must divide both sizes. The
        mask is the exact optimum, but for rounding; see :mod:`sparsekern.formats.transposable`.

        Raises:
            ValueError: scores that are no matrix, not finite, or of sizes that M does not divide; a sparsity
                that is not ``1 − N/M``; bad N or M.
        """
        fixed = cls.fixed_sparsity(n, m)
        scores = check_scores(scores, finite=True)
        check_fixed_sparsity(sparsity, fixed, cls.spec_of(n, m))
        if scores.shape[0] % m or scores.shape[1] % m:
            raise ValueError(
                f"scores must have sizes that are multiples of m = {m} for a transposable mask, "
                f"got shape {list(scores.shape)}"
            )
        return transposable_mask(scores, n, m)

    @classmethod
    def random(
        cls,
        shape: tuple[int, int],
        sparsity: float | None,
        generator: torch.Generator | None,
        n: int,
        m: int,
    ) -> NM:
        """N random columns of each group. Raises where ``sparsity`` is not ``1 − N/M`` or None."""
        check_fixed_sparsity(sparsity, cls.fixed_sparsity(n, m), cls.spec_of(n, m))
        out_features, in_features = check_shape(shape)
        check_nnz(shape[0] * row_values(shape[1], n, m), shape)
        return cls(shape, sample_groups(out_features, in_features, n, m, generator), n, m)

    @classmethod
    def spec_of(cls, n: int, m: int) -> str:
        """``"N:M"``, e.g. ``"2:4"``."""
        return f"{n}:{m}"

    @classmethod
    def fixed_sparsity(cls, n: int, m: int) -> float:
        """``1 − N/M``."""
        n, m = check_nm(n, m)
        return 1.0 - n / m

    @property
    def options(self) -> dict[str, Any]:
        """``{"n": N, "m": M}``."""
        return {"n": self.n, "m": self.m}

    def tensors(self) -> list[Tensor]:
        """``[index, packed]`` and those of :attr:`derived`."""
        return [self.index, self.packed, *self.derived.tensors()]

    def sizes(self) -> list[int]:
        """``[out, in, N, M]``."""
        return [*self.shape, self.n, self.m]


def check_nm(n: int, m: int) -> tuple[int, int]:
    """``(n, m)``, or ``ValueError`` where they are no N:M."""
    if not (type(n) is int and type(m) is int and 1 <= n <= m <= 16):  # True is an int too
        raise ValueError(f"n and m must be integers with 1 <= n <= m <= 16, got n = {n!r} and m = {m!r}")
    return n, m

"""V:N:M sparsity: V rows share 4 of each M consecutive columns, and each row holds N = 2 of those 4."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import (
    INT32_MAX,
    check_fixed_sparsity,
    check_nnz,
    check_one_device,
    check_scores,
    check_shape,
    check_tensor,
)
from .groups import (
    GroupPattern,
    check_group_counts,
    check_positions,
    chunk,
    pack,
    pad_columns,
    row_values,
    top_of_groups,
)
from .metadata import Metadata
from .pattern import check_mask
from .sampling import sample_groups
from .vnm_columns import best_columns

SELECTED = 4  # columns of each group that the rows of a tile share


class VNM(GroupPattern):
    """A pattern of V × M tiles, each with 4 columns that its V rows share; each row holds 2 of the 4.

    V is a multiple of 4, N is 2, which sparse tensor cores run, and ``4 ≤ M ≤ 256`` (Castro et al., "VENOM: A
    Vectorized N:M Format for Unleashing the Power of Sparse Tensor Cores", 2023).

    Args:
        shape: ``(out_features, in_features)``. Where V does not divide ``out``, the last row tile has the
            rows that are left. Where M does not divide ``in``, the last group has the ``c = in % M`` columns
            that are left, selects ``min(4, c)`` of them, and holds ``min(N, c)`` values of each row.
        columns: uint8 ``[ceil(out / V), ceil(in / M), 4]``: the positions of the selected columns in their
            group, strictly ascending; where a last group selects fewer than 4, the last one is repeated.
        index: uint8 ``[out, in·N/M]``, exactly ``[out, in // M · N + min(N, in % M)]``: which of the selected
            columns each value is in, strictly ascending within a group.
        v, n, m: V, N and M.

    Raises:
        ValueError: wrong dtype, shape or contents; the message names the tensor, the rule and what was found.

    The values have the shape of ``index``. Derived when built, for the kernels: ``selected``, int32, the
    columns of W that ``columns`` stands for; ``packed``, uint8 ``[out, bytes]``, ``index`` in 2 bits each,
    the first one lowest, rows padded to a multiple of 4 bytes; and :class:`~sparsekern.formats.csr.Tiles`, on
    GPUs :class:`~sparsekern.formats.metadata.Metadata`.
    """

    format = "vnm"
    state_names = ("columns", "index")

    def __init__(
        self, shape: tuple[int, int], columns: Tensor, index: Tensor, v: int, n: int, m: int
    ) -> None:
        self.shape = check_shape(shape)
        self.v, self.n, self.m = check_vnm(v, n, m)
        check_nnz(self.shape[0] * row_values(self.shape[1], n, m), self.shape)
        _check_contents(self.shape, columns, index, v, n, m)
        self.columns = columns
        self.index = index
        starts = torch.arange(columns.shape[1], dtype=torch.int32, device=index.device) * m
        self.selected = starts[:, None] + columns
        self.packed = pack(index, bits=2)
        self._derive()

    def _columns(self) -> Tensor:
        groups = self.columns.shape[1]
        tile = torch.arange(self.shape[0], device=self.device).div_(self.v, rounding_mode="floor") * groups
        group = torch.arange(self.index.shape[1], device=self.device).div_(self.n, rounding_mode="floor")
        slot = (tile[:, None] + group).mul_(SELECTED).add_(self.index)
        return self.selected.view(-1)[slot]

    def metadata(self) -> Metadata:
        """What sparse tensor cores are told of it."""
        return Metadata.build(self.index, self.n, SELECTED, SELECTED * self.columns.shape[1], self.v)

    @classmethod
    def from_mask(cls, mask: Tensor, v: int, n: int, m: int) -> VNM:
        """The pattern of a bool mask ``[out, in]``.

        A tile that uses fewer than 4 columns selects its first unused ones as well.

        Raises:
            ValueError: a row that does not hold exactly N in a group, or a tile that uses more than 4
                columns; the message names it and what was found.
        """
        check_mask(mask)
        shape, (v, n, m) = check_shape((mask.shape[0], mask.shape[1])), check_vnm(v, n, m)
        check_nnz(shape[0] * row_values(shape[1], n, m), shape)
        check_group_counts(mask, n, m)
        used = _used_columns(mask, v, m)
        counts = used.sum(2)
        if bool((counts > SELECTED).any()):
            tile, group = (counts > SELECTED).nonzero()[0].tolist()
            last_row, last_column = min((tile + 1) * v, shape[0]) - 1, min((group + 1) * m, shape[1]) - 1
            raise ValueError(
                f"mask must use at most {SELECTED} columns in each {v} x {m} tile, but row tile {tile}, "
                f"group {group} (rows {tile * v} to {last_row}, columns {group * m} to {last_column}) "
                f"uses {int(counts[tile, group])}"
            )
        # Used columns first, then the others, each by position.
        position = torch.arange(m, dtype=torch.int16, device=mask.device)
        order = torch.where(used, position, position + m).topk(SELECTED, largest=False).values
        columns = order.remainder_(m).sort().values
        rank = torch.zeros_like(used, dtype=torch.uint8).scatter_(2, columns.long(), 1).cumsum(2) - 1
        row, column = mask.nonzero().unbind(1)
        index = rank.view(-1)[row.div_(v, rounding_mode="floor").mul_(rank[:1].numel()).add_(column)]
        if shape[1] % m:
            columns[:, -1].clamp_(max=shape[1] % m - 1)
        return cls(
            shape,
            columns.to(torch.uint8),
            index.to(torch.uint8).view(shape[0], row_values(shape[1], n, m)),
            v,
            n,
            m,
        )

    @classmethod
    def from_state(cls, shape: tuple[int, int], state: dict[str, Tensor], v: int, n: int, m: int) -> VNM:
        """The pattern of ``columns`` and ``index``, checked completely. Raises as the class does."""
        return cls(shape, state["columns"], state["index"], v, n, m)

    @classmethod
    def prune(cls, scores: Tensor, sparsity: float | None, v: int, n: int, m: int) -> Tensor:
        """Bool mask with the largest sum of ``scores``: 4 columns for each tile, then the best N of each row.

        Exact for ``M ≤ 8``. Beyond that the columns are a local optimum that keeps 99.97 % of the optimum
        or more on average, see :mod:`sparsekern.formats.vnm_columns`. Ties go to the lower column.

        Raises:
            ValueError: scores that are no matrix or not finite; a sparsity that is not ``1 − N/M``; bad V, N
                or M.
        """
        fixed = cls.fixed_sparsity(v, n, m)
        scores = check_scores(scores, finite=True)
        check_fixed_sparsity(sparsity, fixed, cls.spec_of(v, n, m))
        return _best_of_selected(scores, best_columns(scores, v, m), v, n, m)

    @classmethod
    def random(
        cls,
        shape: tuple[int, int],
        sparsity: float | None,
        generator: torch.Generator | None,
        v: int,
        n: int,
        m: int,
    ) -> VNM:
        """4 random columns for each tile, and N random ones of the 4 for each row.

        Raises where ``sparsity`` is not ``1 − N/M`` or None.
        """
        check_fixed_sparsity(sparsity, cls.fixed_sparsity(v, n, m), cls.spec_of(v, n, m))
        out_features, in_features = check_shape(shape)
        check_nnz(shape[0] * row_values(shape[1], n, m), shape)
        row_tiles, groups = -(-out_features // v), -(-in_features // m)
        columns = sample_groups(row_tiles, in_features, SELECTED, m, generator)
        index = sample_groups(out_features, columns.shape[1], n, SELECTED, generator)
        unused = groups * SELECTED - columns.shape[1]
        columns = torch.cat([columns, columns[:, -1:].expand(-1, unused)], 1)
        return cls(shape, columns.view(row_tiles, groups, SELECTED), index, v, n, m)

    @classmethod
    def spec_of(cls, v: int, n: int, m: int) -> str:
        """``"V:N:M"``, e.g. ``"64:2:8"``."""
        return f"{v}:{n}:{m}"

    @classmethod
    def fixed_sparsity(cls, v: int, n: int, m: int) -> float:
        """``1 − N/M``."""
        _, n, m = check_vnm(v, n, m)
        return 1.0 - n / m

    @property
    def options(self) -> dict[str, Any]:
        """``{"v": V, "n": N, "m": M}``."""
        return {"v": self.v, "n": self.n, "m": self.m}

    def tensors(self) -> list[Tensor]:
        """``[columns, index, selected, packed]`` and those of :attr:`derived`."""
        return [self.columns, self.index, self.selected, self.packed, *self.derived.tensors()]

    def sizes(self) -> list[int]:
        """``[out, in, V, N, M]``."""
        return [*self.shape, self.v, self.n, self.m]


def check_vnm(v: int, n: int, m: int) -> tuple[int, int, int]:
    """``(v, n, m)``, or ``ValueError`` where they are no V:N:M."""
    integers = all(type(size) is int for size in (v, n, m))
    if not (integers and 4 <= v <= INT32_MAX and v % 4 == 0 and n == 2 and SELECTED <= m <= 256):
        raise ValueError(
            "v must be a positive multiple of 4, n must be 2, and m an integer in [4, 256], "
            f"got v = {v!r}, n = {n!r} and m = {m!r}"
        )
    return v, n, m


def _best_of_selected(scores: Tensor, selected: Tensor, v: int, n: int, m: int) -> Tensor:
    """Bool ``[out, in]``: the ``n`` largest of each row among the 4 ``selected`` columns of each group.

    Only those 4 are ranked: 8 % of the time at M = 256. Comparing all M columns took 97 %.
    """
    out_features, in_features = scores.shape
    row_tiles, columns = selected.shape
    v = min(v, out_features)
    at = selected.nonzero()[:, 1].view(row_tiles, columns // m * SELECTED)
    padded = pad_columns(scores, m)
    mask = torch.zeros(padded.shape, dtype=torch.bool, device=scores.device)
    step = max(1, chunk(scores.device) // max(1, v * columns))
    for first in range(0, row_tiles, step):
        rows = slice(first * v, (first + step) * v)
        columns_of_rows = at[first : first + step].repeat_interleave(v, 0)[: out_features - first * v]
        kept = top_of_groups(padded[rows].gather(1, columns_of_rows), n, SELECTED)
        mask[rows].scatter_(1, columns_of_rows, kept)
    return mask[:, :in_features].contiguous()


def _used_columns(mask: Tensor, v: int, m: int) -> Tensor:
    """Bool ``[row tiles, groups, m]``: the columns in which a row of the tile has a value."""
    out_features, in_features = mask.shape
    row_tiles, groups, height = -(-out_features // v), -(-in_features // m), min(v, max(out_features, 1))
    mask = F.pad(mask, (0, groups * m - in_features, 0, row_tiles * height - out_features))
    return mask.view(row_tiles, height, groups, m).any(1)


def _check_contents(shape: tuple[int, int], columns: Tensor, index: Tensor, v: int, n: int, m: int) -> None:
    out_features, in_features = shape
    row_tiles, groups, rest = -(-out_features // v), in_features // m, in_features % m
    check_tensor("columns", columns, torch.uint8, (row_tiles, groups + bool(rest), SELECTED))
    check_tensor("index", index, torch.uint8, (out_features, row_values(in_features, n, m)))
    check_one_device(columns=columns, index=index)
    if columns.device.type == "meta":
        return
    last = min(SELECTED, rest)
    rows = columns.flatten(1)[:, : groups * SELECTED + last]
    check_positions("columns", rows, SELECTED, m, rest, groups, "row tile")
    if last:
        wrong = (columns[:, -1, last:] != columns[:, -1, last - 1 : last]).any(1).nonzero()
        if wrong.numel():
            tile = int(wrong[0])
            raise ValueError(
                f"columns must repeat the last of the {last} columns that the last group selects, "
                f"but row tile {tile} holds {columns[tile, -1].tolist()} there"
            )
    check_positions("index", index, n, SELECTED, last, groups, "row")

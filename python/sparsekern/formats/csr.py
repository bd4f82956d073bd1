"""Unstructured sparsity: compressed sparse rows (CSR)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._library import define, has_kernel
from .checks import (
    INT32_MAX,
    check_compressed,
    check_nnz,
    check_scores,
    check_shape,
    check_tensor,
    kept_count,
)
from .pattern import DevicePattern, check_mask, map_tensors, top_mask
from .sampling import sample


@dataclass(frozen=True)
class Tiles:
    """What the CPU kernels need of a pattern whose rows list their columns: derived when it is built.

    N:M and V:N:M patterns are such ones too, so large batches of theirs run on the kernels of CSR.

    Attributes:
        columns: uint16 ``[nnz]``, int32 where ``in > 65536``: columns, ascending within a row. Shorter ones
            are what few rows of x at a time, bound by the weight's bytes, gain from.
        tile_ptr: int32 ``[tiles + 1, out]``: columns are cut into tiles of equal width, and row r's entries
            in tiles ``t : u`` are ``tile_ptr[t, r] : tile_ptr[u, r]``. A tile of x stays in the L1 cache
            while all rows pass over it.
        t_tile_ptr: int32 ``[row tiles + 1, in]``: the same of W transposed, for ``backward_input``.
        t_slot: int32 ``[nnz]``: where each entry stands in W transposed, sorted by column tile, row tile,
            column and row. The kernels transpose W as they read it, so values are stored once.
    """

    columns: Tensor
    tile_ptr: Tensor
    t_tile_ptr: Tensor
    t_slot: Tensor

    @classmethod
    def build(cls, shape: tuple[int, int], row_ptr: Tensor, col_idx: Tensor) -> Tiles:
        """From CSR's checked ``row_ptr`` and ``col_idx``."""
        out_features, in_features = shape
        nnz = col_idx.numel()
        width = tile_width(out_features, in_features, nnz)
        t_width = tile_width(in_features, out_features, nnz)
        columns = col_idx.to(torch.uint16) if in_features <= 2**16 else col_idx
        if has_kernel("csr_derive", row_ptr.device.type):
            return cls(
                columns, *torch.ops.sparsekern.csr_derive(row_ptr, col_idx, in_features, width, t_width)
            )
        rows = row_index(row_ptr, nnz)
        tile_ptr = _tile_ptr(rows, col_idx, out_features, in_features, width)
        t_tile_ptr = _tile_ptr(col_idx, rows, in_features, out_features, t_width)
        block = (col_idx // width) * (out_features // t_width + 1) + rows // t_width
        order = torch.argsort(block * in_features + col_idx, stable=True)  # stable, so rows ascend
        t_slot = torch.empty_like(col_idx)
        t_slot[order] = torch.arange(nnz, dtype=torch.int32, device=order.device)
        return cls(columns, tile_ptr, t_tile_ptr, t_slot)

    def tensors(self) -> list[Tensor]:
        """``[columns, tile_ptr, t_tile_ptr, t_slot]``."""
        return [self.columns, self.tile_ptr, self.t_tile_ptr, self.t_slot]

    def _map(self, fn: Callable[[Tensor], Tensor]) -> Tiles:
        return map_tensors(self, fn)

    # torch (2.13) pickles uint16 tensors but does not unpickle them: columns travel as int16.

    def __getstate__(self) -> dict[str, Tensor]:
        columns = self.columns
        short = columns.dtype == torch.uint16
        return {**vars(self), "columns": columns.view(torch.int16) if short else columns}

    def __setstate__(self, state: dict[str, Tensor]) -> None:
        columns = state["columns"]
        short = columns.dtype == torch.int16
        vars(self).update(state, columns=columns.view(torch.uint16) if short else columns)


@dataclass(frozen=True)
class Transposed:
    """What the GPU kernels need of a pattern beside its rows: W transposed, for ``backward_input``.

    Attributes:
        t_row_ptr: int32 ``[in + 1]``; column c owns the entries ``t_row_ptr[c] : t_row_ptr[c + 1]``.
        t_col_idx: int32 ``[nnz]``: their rows, ascending within a column.
        t_slot: int32 ``[nnz]``: which value each of them is. The values are stored once.
    """

    t_row_ptr: Tensor
    t_col_idx: Tensor
    t_slot: Tensor

    @classmethod
    def build(cls, shape: tuple[int, int], row_ptr: Tensor, col_idx: Tensor) -> Transposed:
        """From CSR's checked ``row_ptr`` and ``col_idx``, on their device."""
        return cls(*transpose(row_ptr, col_idx, shape[1]))

    def tensors(self) -> list[Tensor]:
        """``[t_row_ptr, t_col_idx, t_slot]``."""
        return [self.t_row_ptr, self.t_col_idx, self.t_slot]

    def _map(self, fn: Callable[[Tensor], Tensor]) -> Transposed:
        return map_tensors(self, fn)


class CSR(DevicePattern):
    """An unstructured pattern.

    Args:
        shape: ``(out_features, in_features)``.
        row_ptr: int32 ``[out + 1]``; row r owns the entries ``row_ptr[r] : row_ptr[r + 1]``.
        col_idx: int32 ``[nnz]``; columns, strictly ascending within a row.

    Raises:
        ValueError: wrong dtype, shape or contents; the message names the tensor, the rule and what was found.

    ``derived``: :class:`Tiles`, on GPUs :class:`Transposed`.
    """

    format = "csr"
    state_names = ("row_ptr", "col_idx")
    derived: Tiles | Transposed

    def __init__(self, shape: tuple[int, int], row_ptr: Tensor, col_idx: Tensor) -> None:
        self.shape = check_shape(shape)
        check_compressed("row_ptr", row_ptr, "col_idx", col_idx, *self.shape, "nnz")
        self.row_ptr = row_ptr
        self.col_idx = col_idx
        self._derive()

    def _kind(self, device: str | None = None) -> type[Tiles] | type[Transposed]:
        return Transposed if (device or self.device.type) == "cuda" else Tiles

    def _build(self, kind: type[Tiles] | type[Transposed]) -> Tiles | Transposed:
        return kind.build(self.shape, self.row_ptr, self.col_idx)

    @classmethod
    def from_mask(cls, mask: Tensor) -> CSR:
        """The pattern of a bool mask ``[out, in]``."""
        check_mask(mask)
        shape = (mask.shape[0], mask.shape[1])
        if mask.numel() > INT32_MAX:
            check_nnz(int(mask.sum()), shape)
        col_idx = mask.nonzero()[:, 1].to(torch.int32)
        return cls(shape, counts_to_ptr(mask.sum(1)), col_idx)

    @classmethod
    def from_flat_index(cls, shape: tuple[int, int], flat_index: Tensor) -> CSR:
        """The pattern of ascending int64 positions in the flattened ``[out·in]`` weight. O(nnz) memory.

        Raises:
            ValueError: positions that are no int64 vector, do not ascend strictly, or are outside the weight.
        """
        out_features, in_features = check_shape(shape)
        check_nnz(flat_index.numel(), shape)
        check_tensor("flat_index", flat_index, torch.int64, (flat_index.numel(),))
        if flat_index.numel():
            first, last, ascends = flat_index[0], flat_index[-1], (flat_index[1:] > flat_index[:-1]).all()
            if not bool((first >= 0) & (last < out_features * in_features) & ascends):
                raise ValueError(
                    f"flat_index must ascend strictly in [0, {out_features * in_features}), "
                    f"got {[*flat_index[:4].tolist(), '...', *flat_index[-1:].tolist()]}"
                )
        return cls(shape, *compress(flat_index, *shape))

    @classmethod
    def from_state(cls, shape: tuple[int, int], state: dict[str, Tensor]) -> CSR:
        """The pattern of ``row_ptr`` and ``col_idx``, checked completely. Raises as the class does."""
        return cls(shape, state["row_ptr"], state["col_idx"])

    @classmethod
    def prune(cls, scores: Tensor, sparsity: float | None) -> Tensor:
        """Bool mask of the ``round(numel · (1 − sparsity))`` largest ``scores``, ties to the lower index.

        Raises:
            ValueError: scores that are no matrix or hold NaN; a sparsity outside [0, 1).
        """
        scores = check_scores(scores)
        return top_mask(scores, kept_count(scores.numel(), sparsity))

    @classmethod
    def random(cls, shape: tuple[int, int], sparsity: float | None, generator: torch.Generator | None) -> CSR:
        """``round(out · in · (1 − sparsity))`` random positions, all sets of so many as likely."""
        out_features, in_features = check_shape(shape)
        size = out_features * in_features
        count = kept_count(size, sparsity)
        check_nnz(count, shape)
        return cls.from_flat_index(shape, sample(size, count, generator))

    @classmethod
    def spec_of(cls) -> str:
        """``"csr"``."""
        return cls.format

    @property
    def values_shape(self) -> tuple[int, ...]:
        """``(nnz,)``: the values stand row by row, as in ``col_idx``."""
        return (self.col_idx.numel(),)

    def flat_index(self) -> Tensor:
        """int64 ``[nnz]``: ``row · in + column`` of each entry; ascending."""
        return row_index(self.row_ptr, self.col_idx.numel()) * self.shape[1] + self.col_idx

    @property
    def device(self) -> torch.device:
        """Where the index tensors are."""
        return self.row_ptr.device

    def tensors(self) -> list[Tensor]:
        """``[row_ptr, col_idx]`` and those of :class:`Tiles`, on GPUs of :class:`Transposed`."""
        return [self.row_ptr, self.col_idx, *self.derived.tensors()]


def row_index(row_ptr: Tensor, nnz: int) -> Tensor:
    """int64 ``[nnz]``: the row of each entry."""
    rows = torch.arange(row_ptr.numel() - 1, device=row_ptr.device)
    return torch.repeat_interleave(rows, row_ptr.diff(), output_size=nnz)


def transpose(ptr: Tensor, idx: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(ptr, idx)`` of the transpose, and which entry each of its entries is; int32, on their device."""
    order = torch.argsort(idx, stable=True)  # stable, so rows ascend
    starts = torch.arange(columns + 1, device=idx.device)
    t_ptr = torch.searchsorted(idx[order], starts, out_int32=True)
    t_idx = row_index(ptr, idx.numel())[order].to(torch.int32)
    return t_ptr, t_idx, order.to(torch.int32)


def compress(flat_index: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """``(ptr, idx)``, int32, of ascending int64 positions ``row · columns + column``."""
    starts = torch.arange(rows + 1, device=flat_index.device) * columns
    ptr = torch.searchsorted(flat_index, starts).to(torch.int32)
    return ptr, torch.remainder(flat_index, max(columns, 1)).to(torch.int32)


def counts_to_ptr(counts: Tensor) -> Tensor:
    """Exclusive prefix sum of ``counts [n]`` as int32 ``[n + 1]``."""
    ptr = torch.zeros(counts.numel() + 1, dtype=torch.int32, device=counts.device)
    ptr[1:] = counts.cumsum(0)
    return ptr


def tile_width(rows: int, cols: int, nnz: int) -> int:
    """Columns per tile: a power of two, at least 128.

    128 columns × 64 batch floats are 32 KB, the L1 cache. Fewer than 8 entries of a row per tile, on average,
    cost more than L1 misses, because each row's accumulators are loaded and stored once per tile: so tiles
    grow up to 1024 columns. Beyond that they grow while they hold less than one entry, so that ``tile_ptr``
    stays O(nnz).
    """
    width = 128
    while nnz * width < (8 if width < 1024 else 1) * rows * cols and width < 2**16:
        width *= 2
    return width


def _tile_ptr(rows: Tensor, cols: Tensor, n_rows: int, n_cols: int, width: int) -> Tensor:
    """int32 ``[tiles + 1, n_rows]``: where the entries of each row and column tile begin.

    For entries sorted by row, then column.
    """
    tiles = max(1, -(-n_cols // width))
    bins = rows.long() * tiles + torch.div(cols, width, rounding_mode="floor")
    ptr = counts_to_ptr(torch.bincount(bins, minlength=n_rows * tiles))
    return torch.cat([ptr[:-1].view(n_rows, tiles).t(), ptr[tiles::tiles][None]]).contiguous()


define(
    "csr_derive(Tensor row_ptr, Tensor col_idx, int in_features, int width, int t_width) "
    "-> (Tensor, Tensor, Tensor)"
)

"""N of each group of M columns: what the formats N:M and V:N:M share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from . import triton_masks
from .csr import Tiles
from .metadata import Metadata
from .pattern import DevicePattern


def chunk(device: torch.device) -> int:
    """How many scores pruning works on at a time.

    On a CPU 2¹⁹: they and what is derived from them stay in the L3 cache. On a GPU, where each step is a
    launch and some wait for a number, 2²⁴: 64 MB, and ten times that in what is derived.
    """
    return 2**19 if device.type == "cpu" else 2**24


class GroupPattern(DevicePattern):
    """A pattern with the same number of values in each row: N in each group of M columns.

    The last group holds ``min(N, c)`` values where only ``c = in % M`` columns are left for it.
    """

    n: int
    m: int
    index: Tensor
    packed: Tensor
    derived: Tiles | Metadata

    @abstractmethod
    def metadata(self) -> Metadata:
        """What sparse tensor cores are told of it."""

    @abstractmethod
    def _columns(self) -> Tensor:
        """int32 ``[out, values of a row]``: their columns."""

    @property
    def device(self) -> torch.device:
        """Where the index tensors are."""
        return self.index.device

    def _kind(self, device: str | None = None) -> type[Tiles] | type[Metadata]:
        return Metadata if (device or self.device.type) == "cuda" else Tiles

    def _build(self, kind: type[Tiles] | type[Metadata]) -> Tiles | Metadata:
        if kind is Metadata:
            return self.metadata()
        out_features, row_nnz = self.index.shape
        row_ptr = torch.arange(out_features + 1, dtype=torch.int32, device=self.device) * row_nnz
        return Tiles.build(self.shape, row_ptr, self._columns().reshape(-1))

    @property
    def values_shape(self) -> tuple[int, ...]:
        """``(out, in·N/M)``: as ``index``; the values of a row stand by ascending column."""
        return tuple(self.index.shape)

    def flat_index(self) -> Tensor:
        """int64 ``[out, in·N/M]``: ``row · in + column`` of each value; ascending."""
        rows = torch.arange(self.shape[0], device=self.index.device)[:, None]
        columns = self.derived.columns if isinstance(self.derived, Tiles) else self._columns()
        return columns.long().view(self.index.shape) + rows * self.shape[1]


def row_values(in_features: int, n: int, m: int) -> int:
    """How many values a row of ``in_features`` columns holds."""
    return in_features // m * n + min(n, in_features % m)


def split_groups(rows: Tensor, size: int, groups: int) -> Iterator[tuple[int, Tensor]]:
    """``rows [out, k]`` by group, each part after the number of its first group.

    ``[out, groups, size]``, and of what is left, ``[out, 1, rest]``.
    """
    out_features = rows.shape[0]
    yield 0, rows[:, : groups * size].reshape(out_features, groups, size)
    if rows.shape[1] > groups * size:
        yield groups, rows[:, None, groups * size :]


def check_group_counts(mask: Tensor, n: int, m: int) -> None:
    """Raise unless ``mask`` holds exactly ``min(n, size)`` in each group of ``m`` columns of each row."""
    for first, group in split_groups(mask, m, mask.shape[1] // m):
        must = min(n, group.shape[2])
        counts = group.view(torch.uint8).sum(2, dtype=torch.int16)
        wrong = (counts != must).nonzero()
        if wrong.numel():
            row, g = wrong[0].tolist()
            start, size = (first + g) * m, group.shape[2]
            raise ValueError(
                f"mask must hold exactly {must} of each {size} columns, but row {row}, group {first + g} "
                f"(columns {start} to {start + size - 1}) holds {int(counts[row, g])}"
            )


def check_positions(name: str, rows: Tensor, size: int, limit: int, rest: int, groups: int, row: str) -> None:
    """Raise unless the positions in each group ascend strictly and are below ``limit``.

    Args:
        name: of the tensor, for messages.
        rows: uint8 ``[out, k]``.
        size: positions per group.
        limit: what they must be below; in a last group that is cut short, ``rest``.
        groups: how many groups are whole.
        row: what a row is called in messages.
    """
    for (first, group), below in zip(split_groups(rows, size, groups), (limit, rest), strict=False):
        wrong = group > below - 1  # below may be 256
        wrong[..., 1:] |= group[..., 1:] <= group[..., :-1]
        if bool(wrong.any()):
            r, g = wrong.any(2).nonzero()[0].tolist()
            raise ValueError(
                f"{name} must ascend strictly in [0, {below}) within each group, but {row} {r}, "
                f"group {first + g} holds {group[r, g].tolist()}"
            )


def pack(index: Tensor, bits: int) -> Tensor:
    """``index [out, k]`` uint8 in 2 or 4 ``bits`` each, the first one lowest: uint8 ``[out, bytes]``.

    Rows are padded to a multiple of 4 bytes.
    """
    per_byte = 8 // bits
    row_bytes = -(-index.shape[1] * bits // 32) * 4
    padded = F.pad(index, (0, row_bytes * per_byte - index.shape[1]))
    positions = padded.view(index.shape[0], row_bytes, per_byte)
    packed = positions[..., 0].clone()
    for i in range(1, per_byte):
        packed |= positions[..., i] << (bits * i)
    return packed


def beaten(planes: Tensor) -> Tensor:
    """How many of the other planes are ahead of each: elementwise, larger, or equal and earlier.

    So ``beaten < n`` marks the ``n`` largest, ties to the lower plane. For 2:4 and 8:16 that takes a quarter
    and half of the time of ``torch.topk``, which leaves ties to chance, and a seventh and a third of a stable
    sort's.

    Args:
        planes: ``[planes, ...]``, no NaN, and no more than 256 of them.

    Returns:
        uint8 of the same shape.
    """
    before = torch.arange(len(planes), device=planes.device).to(torch.uint8)
    counts = before.view(-1, *[1] * (planes.dim() - 1)).repeat(1, *planes.shape[1:])
    for i in range(len(planes) - 1):
        wins = (planes[i + 1 :] > planes[i]).view(torch.uint8)
        counts[i] += wins.sum(0, dtype=torch.uint8)
        counts[i + 1 :] -= wins
    return counts


def top_of_groups(scores: Tensor, n: int, m: int) -> Tensor:
    """Bool ``[out, in]``: the ``n`` largest of each ``m`` columns of each row, ties to the lower column."""
    if (kernels := triton_masks.kernels_for(scores)) is not None:
        marked: Tensor = kernels.top_of_groups(scores.contiguous(), n, m)
        return marked
    out_features, in_features = scores.shape
    padded = pad_columns(scores, m)
    groups = padded.shape[1] // m
    padded = padded.view(out_features, groups, m)
    mask = torch.empty(padded.shape, dtype=torch.bool, device=scores.device)
    step = max(1, 2 * chunk(scores.device) // max(1, groups * m))
    for first in range(0, out_features, step):
        rows = slice(first, first + step)
        chosen = beaten(torch.stack(padded[rows].unbind(2))) < n
        torch.stack(chosen.unbind(), 2, out=mask[rows])
    return mask.view(out_features, groups * m)[:, :in_features].contiguous()


def pad_columns(scores: Tensor, m: int) -> Tensor:
    """``scores [out, in]``, contiguous, with columns of −∞ up to a multiple of ``m``."""
    missing = -scores.shape[1] % m
    return F.pad(scores, (0, missing), value=-torch.inf) if missing else scores.contiguous()

"""What sparse tensor cores are told of a pattern with at most 2 values in each 4 columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .pattern import map_tensors

_ABSENT = 255  # a position that no group has


@dataclass(frozen=True)
class Metadata:
    """The positions of the operand's two slots in each 4 columns, in the order in which warps load them.

    Of 4 columns, two slots hold the values, by column. A lone value is in the first slot, or in the second
    one if it is in the last column: so the slots' positions can ascend, which the hardware demands, whatever
    is missing. They take 4 bits, the first slot's lowest.

    Attributes:
        words: int32 ``[words]``. A row tile (V rows; in N:M all) is cut into blocks of 16 rows and 128
            columns, by columns; N:M has a multiple of 4 blocks of rows. Each has 64 words ``[2, 8, 4]``: word
            (p, g, k) holds columns 32·k + 16·p to 32·k + 16·p + 15 of row g in its lower half and of row
            g + 8 in its upper one. Such words are what lanes load (PTX ISA, "Matrix fragments for sparse
            mma.m16n8k32": lane 4·g + t has word (t % 2, g, t / 2) of 64 columns), and in this order they are
            CUTLASS's tensor E for ``wgmma`` on Hopper. Empty where the pattern can hold more than 2 values in
            4 columns: :meth:`fits`.
        transposed: of N:M, the words of Wᵀ where W and Wᵀ are 2:4, else empty: then the gradient of x is a
            sparse product too. Of V:N:M None.
    """

    words: Tensor
    transposed: Tensor | None = None

    @property
    def of_both(self) -> bool:
        """Whether there are words of Wᵀ."""
        return self.transposed is not None and len(self.transposed) > 0

    @staticmethod
    def fits(n: int, width: int) -> bool:
        """Whether N of each ``width`` columns are at most 2 of each 4."""
        return (n <= 2 and width % 4 == 0) or (n, width) == (1, 2)

    @classmethod
    def build(cls, index: Tensor, n: int, width: int, columns: int, tile_rows: int | None = None) -> Metadata:
        """From the values' positions in their groups. Of 2:4 it waits for one number, of others for none.

        Args:
            index: uint8 ``[out, values of a row]``.
            n: values of a group.
            width: columns of a group.
            columns: of a row, the last group may have fewer than ``width``.
            tile_rows: of a row tile of V:N:M. None: of N:M.
        """
        rows, none = index.shape[0], index.new_empty(0, dtype=torch.int32)
        if not cls.fits(n, width) or rows == 0 or columns == 0:
            return cls(none, none if tile_rows is None else None)
        occupied = _occupied(index, n, width, columns)[:, : -(-columns // 4)]
        if tile_rows is not None:
            return cls(_words(occupied, tile_rows))
        square = (n, width, rows % 4, columns % 4) == (2, 4, 0, 0)
        turned = _transposed(occupied) if square else None
        return cls(_words(occupied), none if turned is None else _words(turned))

    def tensors(self) -> list[Tensor]:
        """``[words]``, and of N:M ``transposed``."""
        return [self.words] if self.transposed is None else [self.words, self.transposed]

    def _map(self, fn: Callable[[Tensor], Tensor]) -> Metadata:
        return map_tensors(self, fn)


def _occupied(index: Tensor, n: int, width: int, columns: int) -> Tensor:
    """uint8 ``[out, ceil(columns / 4)]``: bit p tells that column p of the 4 holds a value."""
    rows, groups = index.shape[0], -(-columns // width)
    positions = F.pad(index, (0, groups * n - index.shape[1]), value=_ABSENT).view(rows, groups, n)
    if width == 2:
        positions = F.pad(positions, (0, 0, 0, groups % 2), value=_ABSENT).view(rows, -1, 2)
        return _bit(positions[..., 0]) | _bit(positions[..., 1]) << 2
    quads = [
        sum((_bit(positions[..., i] - 4 * q) for i in range(1, n)), _bit(positions[..., 0] - 4 * q))
        for q in range(width // 4)
    ]
    return torch.stack(quads, 2).view(rows, -1)


def _transposed(occupied: Tensor) -> Tensor | None:
    """The same of Wᵀ, uint8 ``[in, out / 4]``, if each 4 rows hold 2 values in each column, else None."""
    each = torch.arange(4, dtype=torch.uint8, device=occupied.device)
    bits = occupied.view(-1, 4, occupied.shape[1], 1) >> each & 1  # row of tiles, row, tile, column
    if not bool((bits.sum(1, dtype=torch.uint8) == 2).all()):
        return None
    turned = (bits << each[:, None, None]).sum(1, dtype=torch.uint8)
    return turned.permute(1, 2, 0).reshape(-1, bits.shape[0])


def _words(occupied: Tensor, tile_rows: int | None = None) -> Tensor:
    """:attr:`Metadata.words`; ``tile_rows`` of V:N:M."""
    nibbles = torch.tensor(_SLOTS, dtype=torch.uint8, device=occupied.device)[occupied.int()]
    rows, quads = nibbles.shape
    padding = 1 if tile_rows else 4
    tile_rows = min(tile_rows or rows, rows)
    tiles, column_blocks = -(-rows // tile_rows), -(-quads // 32)
    row_blocks = -(-tile_rows // (16 * padding)) * padding
    nibbles = F.pad(nibbles, (0, column_blocks * 32 - quads, 0, tiles * tile_rows - rows), value=_SLOTS[0])
    nibbles = nibbles.view(tiles, tile_rows, column_blocks * 32)
    nibbles = F.pad(nibbles, (0, 0, 0, row_blocks * 16 - tile_rows), value=_SLOTS[0])
    # Rows: row block, half, g; columns: column block, k, p, byte, half of a byte.
    half_bytes = nibbles.view(tiles, row_blocks, 2, 8, column_blocks, 4, 2, 2, 2)
    in_bytes = half_bytes[..., 0] | half_bytes[..., 1] << 4
    return in_bytes.permute(0, 4, 1, 6, 3, 5, 2, 7).contiguous().view(-1).view(torch.int32)


def _bit(position: Tensor) -> Tensor:
    """``1 << position`` where that is below 4, else 0; below 0 is far above it in uint8."""
    return torch.where(position < 4, torch.ones_like(position) << (position & 3), 0)


def _slots(bits: int) -> int:
    """The positions of both slots, from the bits of the columns that hold a value."""
    at = [p for p in range(4) if bits >> p & 1]
    if len(at) < 2:  # 0 and 1; p and 3; 2 and 3
        at = [0, 1] if not at else [min(at[0], 2), 3]
    return at[0] | at[1] << 2


_SLOTS = [_slots(bits) for bits in range(16)]
